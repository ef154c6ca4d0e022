from __future__ import annotations

from typing import Any

from tables import footer, grid, mib, step_times


def table(result: dict[str, Any]) -> str:
    stock = {row["model"]: row for row in result["rows"] if row.get("recipe") == "stock" and "model" in row}
    rows = []
    for row in (r for r in result["rows"] if "model" in r):
        base = stock[row["model"]]
        cells = [f"{mib(row[key])} ({row[key] / base[key]:.3f})" for key in ("saved_bytes", "peak_bytes")]
        rows.append([row["model"], row["recipe"], *cells])
    header = [
        "model",
        "recipe",
        "saved for backward, MiB (of stock)",
        "peak above weights and optimizer, MiB (of stock)",
    ]
    return grid(header, rows) + "\n" + footer(result)


def times(result: dict[str, Any]) -> str:
    columns = {"timed_model": "model", "recipe": "recipe"}
    return step_times(result, told_by="timed_model", columns=columns, ratio="step time / stock")
