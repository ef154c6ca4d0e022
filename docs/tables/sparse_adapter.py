from __future__ import annotations

from typing import Any

from tables import footer, grid, mib


def table(result: dict[str, Any]) -> str:
    rows = []
    for row in (r for r in result["rows"] if "width" in r):
        seconds = {name: 1e3 * value for name, value in row["seconds"].items()}
        steps = [f"{seconds[name]:,.1f}" for name in ("lookup_of_all", "lookup_of_groups", "gather", "scatter")]
        own = seconds["row_adamw"]
        dense = [f"{seconds[name]:,.0f} ({seconds[name] / own:.1f})" for name in ("adamw", "fused_adamw")]
        rows.append([f"{row['width']:,}", f"{row['bank_bytes'] / 2**30:.2f}", *steps, f"{own:,.1f}", *dense])
    header = [
        "width",
        "bank, GiB",
        "all rows scored",
        "rows of 8 groups scored",
        "gather",
        "add gradients",
        "row-wise AdamW",
    ]
    header += ["torch's AdamW over all rows (times ours)", "its fused form (times ours)"]
    return grid(header, rows) + "\n" + footer(result)


def device(result: dict[str, Any]) -> str:
    rows = [
        [row["device"], *(mib(n) for n in (row["peak_bytes"], row["by_category"]["host"]))]
        for row in result["rows"]
        if "device" in row
    ]
    return grid(["recipe", "device peak, MiB", "host, MiB"], rows) + "\n" + footer(result)


def measured(result: dict[str, Any]) -> str:
    rows = [
        [f"{row['measured']:,}", *(f"{row[key]:,}" for key in ("peak_bytes", "planned_peak_bytes", "host_bytes"))]
        for row in result["rows"]
        if "measured" in row
    ]
    header = ["rows a layer", "allocator's peak of a step, bytes", "planned, bytes", "host, bytes"]
    return grid(header, rows) + "\n" + footer(result)
