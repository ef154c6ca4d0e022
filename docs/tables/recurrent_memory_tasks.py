from __future__ import annotations

import statistics
from typing import Any

from tables import footer, grid, spread


def table(result: dict[str, Any]) -> str:
    rows = []
    for task, memory in dict.fromkeys((row["task"], row["memory"]) for row in result["rows"]):
        own = [row for row in result["rows"] if (row["task"], row["memory"]) == (task, memory)]
        seconds = statistics.fmean(row["cpu_seconds"] for row in own)
        rows.append([task, memory, spread([row["accuracy"] for row in own]), str(len(own)), f"{seconds:.0f}"])
    return grid(["task", "", "accuracy (range)", "seeds", "CPU seconds"], rows) + "\n" + footer(result)
