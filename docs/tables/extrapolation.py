from __future__ import annotations

from typing import Any

from tables import footer, grid


def table(result: dict[str, Any]) -> str:
    rows = [
        [
            row["name"],
            "extended" if row["extended"] else "in full",
            f"{row['peak_bytes'] / 2**30:,.2f}",
            f"{row['difference_bytes']:,}",
            f"{row['largest_phase_difference']:,}",
            row["peak_phase"]
            + ("" if row["short_peak_phase"] == row["peak_phase"] else f" ({row['short_peak_phase']})"),
            f"{100 * row['line_error']:+.2f}",
        ]
        for row in result["rows"]
    ]
    header = ["model", "simulated", "peak, GiB", "peak apart, bytes", "any phase apart, bytes"]
    header += ["phase of the peak (of the short stack's)", "line through two short peaks, %"]
    return grid(header, rows) + "\n" + footer(result)
