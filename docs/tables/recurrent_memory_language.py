from __future__ import annotations

import statistics
from typing import Any

from tables import footer, grid, spread


def table(result: dict[str, Any]) -> str:
    rows = []
    for recipe in result["config"]["recipes"]:
        own = [row for row in result["rows"] if row["recipe"] == recipe]
        if own:
            seconds = statistics.fmean(row["cpu_seconds"] for row in own)
            found = [spread([row[key] for row in own]) for key in ("perplexity", "train_perplexity")]
            rows.append([recipe, *found, f"{statistics.fmean(row['steps'] for row in own):.0f}", f"{seconds:.0f}"])
    header = ["", "test perplexity (range over seeds)", "training text", "steps", "CPU seconds"]
    return grid(header, rows) + "\n" + footer(result)
