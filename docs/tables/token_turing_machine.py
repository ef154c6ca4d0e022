from __future__ import annotations

from typing import Any

from tables import footer, grid, mib, spread


def table(result: dict[str, Any]) -> str:
    trained = [row for row in result["rows"] if "accuracy" in row]
    heads = dict.fromkeys(row["head"] for row in trained)
    rows = [[head, spread([row["accuracy"] for row in trained if row["head"] == head])] for head in heads]
    return (
        grid(["head", f"accuracy at {result['config']['steps']} steps (range over seeds)"], rows)
        + "\n"
        + footer(result)
    )


def cost(result: dict[str, Any]) -> str:
    rows = [
        [
            row["head"],
            f"{row['steps']}",
            f"{1000 * row['seconds_a_step']:.1f}",
            mib(row["saved_bytes"]),
            mib(row["planned_peak_bytes"]),
        ]
        for row in result["rows"]
        if "accuracy" not in row
    ]
    header = ["head", "steps", "ms of CPU for each", "saved, MiB", "peak above the weights, MiB"]
    return grid(header, rows) + "\n" + footer(result)
