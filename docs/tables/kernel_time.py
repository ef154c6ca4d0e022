from __future__ import annotations

from typing import Any

from tables import footer, grid, mib


def table(result: dict[str, Any]) -> str:
    """A line per operator and dtype."""
    rows = []
    for row in result["rows"]:
        temporary = row["temporary_bytes"]
        times = ["differs", "", ""]
        if "milliseconds" in row:
            median, (low, high) = row["milliseconds"], row["range"]["triton"]
            times = [
                f"{median['torch']:.3f}",
                f"{median['triton']:.3f} ({low:.3f}-{high:.3f})",
                f"{row['speedup']:.2f}",
            ]
        apart = f"{row['difference']:.0e}" if row["difference"] else "0"
        sizes = f"{mib(temporary['torch'])} / {mib(temporary['triton'])}"
        rows.append([row["operator"], row["dtype"], *times, sizes, apart])
    header = ["operator", "dtype", "plain torch, ms", "kernel, ms (range)", "times faster"]
    return grid([*header, "temporary, MiB: torch / kernel", "relative difference"], rows) + "\n" + footer(result)
