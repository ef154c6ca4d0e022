from __future__ import annotations

import statistics
from typing import Any

from tables import footer, grid, spread


def table(result: dict[str, Any]) -> str:
    rows = []
    for recipe in dict.fromkeys(row["recipe"] for row in result["rows"]):
        own = [row for row in result["rows"] if row["recipe"] == recipe]
        steps, seconds = (statistics.fmean(row[key] for row in own) for key in ("steps", "cpu_seconds"))
        rows.append([recipe, f"{steps:.0f}", f"{seconds:.0f}", spread([row["loss"] for row in own])])
    return grid(["recipe", "steps", "CPU seconds", "held-out loss (range over seeds)"], rows) + "\n" + footer(result)
