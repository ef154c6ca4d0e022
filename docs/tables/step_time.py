from __future__ import annotations

import statistics
from typing import Any

from tables import footer, grid


def table(result: dict[str, Any]) -> str:
    rows = [
        [
            row["family"],
            row["configuration"],
            " x ".join(map(str, row["batch"])),
            f"{row['measured']:.3f} ({row['measured_least']:.3f})",
            f"{row['predicted']:.3f}",
            f"{row['error_percent']:+.1f} ({row['error_to_least_percent']:+.1f})",
        ]
        for row in result["rows"]
    ]
    sizes = [sorted(abs(row[key]) for row in result["rows"]) for key in ("error_percent", "error_to_least_percent")]
    (middle, worst), (other, other_worst) = ((statistics.median(s), s[-1]) for s in sizes)
    header = ["model", "configuration", "batch", "measured step time / stock (of the fastest steps)"]
    note = (
        f"\n\nError over {len(rows)} configurations: median {middle:.1f} %, worst {worst:.1f} % (beside the ratio of "
        f"the fastest steps: {other:.1f} %, {other_worst:.1f} %). Calibrated in "
        f"{result['config']['calibration_seconds']} s."
    )
    return grid([*header, "predicted", "error, %"], rows) + note + "\n" + footer(result)
