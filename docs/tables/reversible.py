from __future__ import annotations

from typing import Any

from tables import footer, grid, mib, step_times


def table(result: dict[str, Any]) -> str:
    rows = []
    peaks = [row for row in result["rows"] if "blocks" in row]
    base = {row["blocks"]: row for row in peaks if row["recipe"] == "Lora + Checkpointing"}
    for row in peaks:
        ratio = row["peak_bytes"] / base[row["blocks"]]["peak_bytes"]
        cells = [mib(row[key]) for key in ("saved_bytes", "planned_peak_bytes", "peak_bytes")]
        rows.append([str(row["blocks"]), row["recipe"], *cells, f"{ratio:.2f}"])
    header = ["blocks", "recipe", "saved, MiB", "planned peak", "measured peak, MiB", "of Lora + Checkpointing"]
    return grid(header, rows) + "\n" + footer(result)


def times(result: dict[str, Any]) -> str:
    return step_times(result, told_by="against", columns={"recipe": "recipe", "against": "against"}, ratio="step time")
