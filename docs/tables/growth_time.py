from __future__ import annotations

import math
from typing import Any

from tables import footer, grid


def table(result: dict[str, Any]) -> str:
    """How the time grows: the exponent of each dimension between its two sizes."""
    sizes = result["config"]["sizes"]
    found = {(row["recipe"], row["dimension"]): row["measured_least"] for row in result["rows"]}
    lines = []
    for recipe in dict.fromkeys(recipe for recipe, _ in found):
        cells = []
        for name, (small, large) in sizes.items():
            ratio = found.get((recipe, name))
            cells.append("-" if ratio is None else f"{math.log(ratio) / math.log(large / small):.2f}")
        lines.append([recipe, *cells])
    header = ["recipe", *(f"{name}, {small:,} to {large:,}" for name, (small, large) in sizes.items())]
    return grid(header, lines) + "\n" + footer(result)
