from __future__ import annotations

from typing import Any

from tables import footer, grid


def table(result: dict[str, Any]) -> str:
    rows = [
        [
            row["data"],
            f"{row['kept_rows']:,}",
            f"{row['published_percent']:.2f}",
            f"{row['planned_percent']:.2f}",
            f"{row['adamw_bytes_saved'] / 1e6:,.0f}",
        ]
        for row in result["rows"]
    ]
    header = ["data", "rows kept of 250,002", "parameters removed, published, %", "by plan, %", "AdamW fp32 saves, MB"]
    return grid(header, rows) + "\n" + footer(result)
