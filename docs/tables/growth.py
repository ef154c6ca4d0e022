from __future__ import annotations

import collections
import math
from typing import Any

from tables import footer, grid

Row = dict[str, Any]


def table(result: dict[str, Any]) -> str:
    """How the peak grows: the exponent of each dimension between its two largest sizes."""
    sizes = result["config"]["sizes"]
    lines = [
        [recipe, *(f"{_exponent(_line(result, recipe, dimension)):.2f}" for dimension in sizes)]
        for recipe in _recipes(result)
    ]
    header = ["recipe", *(f"{name}, {of[-2]:,} to {of[-1]:,}" for name, of in sizes.items())]
    return grid(header, lines) + "\n" + footer(result)


def blocks(result: dict[str, Any]) -> str:
    """What a further block adds, in 4-byte numbers of each of its inputs' numbers: kept, by theory, and to the peak."""
    base, theory = result["config"]["base"], result["config"]["theory"]
    numbers = 4 * base["rows"] * base["length"] * base["width"]
    lines = []
    for recipe in _recipes(result):
        line = _line(result, recipe, "blocks")
        (a, b), count = line[-2:], line[-1]["size"] - line[-2]["size"]
        kept, peak = ((b[key] - a[key]) / count / numbers for key in ("saved_bytes", "peak_bytes"))
        gradients = 4 * (b["trainable"] - a["trainable"]) / count / numbers
        told = f"{theory[recipe]:.3f}" if recipe in theory else ""
        lines.append([recipe, f"{kept:.3f}", told, f"{peak:.2f}", f"{gradients:.2f}"])
    return grid(["recipe", "kept", "by theory", "peak", "gradients in it"], lines) + "\n" + footer(result)


def _recipes(result: dict[str, Any]) -> list[str]:
    """Those that are there at all sizes."""
    counts = collections.Counter(row["recipe"] for row in result["rows"])
    whole = sum(map(len, result["config"]["sizes"].values()))
    return [recipe for recipe, count in counts.items() if count == whole]


def _line(result: dict[str, Any], recipe: str, dimension: str) -> list[Row]:
    found = [row for row in result["rows"] if (row["recipe"], row["dimension"]) == (recipe, dimension)]
    return sorted(found, key=lambda row: row["size"])


def _exponent(line: list[Row]) -> float:
    a, b = line[-2:]
    return math.log(b["peak_bytes"] / a["peak_bytes"]) / math.log(b["size"] / a["size"])
