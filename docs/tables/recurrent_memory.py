from __future__ import annotations

from typing import Any

from tables import footer, grid, mib


def table(result: dict[str, Any]) -> str:
    recipes = [r for r in result["config"]["recipes"] if any(row["recipe"] == r for row in result["rows"])]
    rows = []
    for count in result["config"]["segments"]:
        own = {row["recipe"]: row for row in result["rows"] if row["segments"] == count}
        cells = [own.get(recipe) for recipe in recipes]
        peaks = [
            f"{mib(row['planned_peak_bytes'])} / {mib(row['measured_peak_bytes'])}" if row else "" for row in cells
        ]
        rows.append([str(count), *peaks, *(f"{row['seconds']:.2f}" if row else "" for row in cells[:2])])
    header = ["segments", *(f"{recipe}, MiB planned / measured" for recipe in recipes)]
    header += [f"{recipe}, s" for recipe in recipes[:2]]
    return grid(header, rows) + "\n" + footer(result)
