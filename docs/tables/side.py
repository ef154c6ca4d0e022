from __future__ import annotations

from typing import Any

from tables import footer, grid, mib, step_times


def table(result: dict[str, Any]) -> str:
    peaks = [row for row in result["rows"] if "planned_peak_bytes" in row]
    stock = {row["model"]: row for row in peaks if row["recipe"] == "stock"}
    rows = []
    for row in peaks:
        base = stock[row["model"]]
        cells = [f"{mib(row[key])} ({row[key] / base[key]:.2f})" for key in ("saved_bytes", "planned_peak_bytes")]
        rows.append([row["model"], row["recipe"], f"{row['trainable_parameters']:,}", *cells])
    header = [
        "model",
        "recipe",
        "parameters that train",
        "saved, MiB (of stock)",
        "peak above the weights, MiB (of stock)",
    ]
    return grid(header, rows) + "\n" + footer(result)


def times(result: dict[str, Any]) -> str:
    columns = {"model": "model (fewer blocks)", "recipe": "recipe"}
    return step_times(result, told_by="seconds", columns=columns, ratio="step time / stock")
