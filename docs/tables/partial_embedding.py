from __future__ import annotations

from typing import Any

from tables import footer, grid, mib, spread


def table(result: dict[str, Any]) -> str:
    rows = []
    for task in dict.fromkeys(row["task"] for row in result["rows"]):
        own = [row for row in result["rows"] if row["task"] == task]
        first = own[0]
        error = 100 * (first["predicted_drop"] / first["measured_drop"] - 1)
        rows.append(
            [
                task,
                f"{first['kept_rows']:,} of 30,522",
                f"{spread([r['stock'] for r in own])}",
                f"{spread([r['partial_embedding'] for r in own])}",
                "yes" if all(r["identical"] for r in own) else "no",
                f"{mib(first['stock_peak_bytes'])} -> {mib(first['peak_bytes'])}",
                f"{mib(first['measured_drop'])} ({error:+.2f} %)",
                f"{first['step_time']:.3f}",
            ]
        )
    header = [
        "task",
        "rows kept",
        "stock",
        "PartialEmbedding",
        "every metric of every seed identical",
        "peak, MiB",
        "drop, MiB (error of the prediction)",
        "step time / stock",
    ]
    return grid(header, rows) + "\n" + footer(result)
