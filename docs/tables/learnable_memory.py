from __future__ import annotations

from typing import Any

from tables import footer, grid, mib, spread


def table(result: dict[str, Any]) -> str:
    times = {row["recipe"]: row["step_time"] for row in result["rows"] if row["task"] is None}
    trained = [row for row in result["rows"] if row["task"] is not None]
    rows = []
    for recipe in dict.fromkeys(row["recipe"] for row in trained):
        own = [row for row in trained if row["recipe"] == recipe]
        of_task = [[row["accuracy"] for row in own if row["task"] == task] for task in result["config"]["tasks"]]
        kept = [row["earlier_logits_bit_identical"] for row in own if "earlier_logits_bit_identical" in row]
        rows.append(
            [
                recipe,
                f"{own[0]['trainable_parameters']:,}",
                *(spread(found) if found else "" for found in of_task),
                ("bit for bit" if all(kept) else "no") if kept else "one model a task",
                mib(own[0]["saved_bytes"]),
                mib(own[0]["planned_peak_bytes"]),
                f"{times[recipe]:.2f}",
            ]
        )
    header = [
        "recipe",
        "parameters that train (digits)",
        *(f"{task} (range over seeds)" for task in result["config"]["tasks"]),
    ]
    header += ["earlier tasks stay", "saved, MiB", "peak above the weights, MiB", "step time / full"]
    return grid(header, rows) + "\n" + footer(result)
