from __future__ import annotations

from typing import Any

from tables import footer, grid, mib


def table(result: dict[str, Any]) -> str:
    rows = [
        [
            row["name"],
            mib(row["peak_bytes"]),
            mib(row["predicted_peak_bytes"]),
            mib(row["saved_bytes"]),
            f"{row['step_time']:.2f}",
            f"{row['metric']:.4f}",
        ]
        for row in result["rows"]
    ]
    header = ["recipe", "peak, MiB", "predicted, MiB", "saved for backward, MiB", "step time / stock", "accuracy"]
    return grid(header, rows) + "\n" + footer(result)
