"""Methods on quantised bases, from the tests that run them."""

from __future__ import annotations


def table(result: dict) -> str:
    """A row for each recipe: how far gradients are from those on the dequantised base."""
    kinds = result["kinds"]
    lines = [f"| recipe | {' | '.join(kinds)} |", "|---|" + "---:|" * len(kinds)]
    for row in result["rows"]:
        cells = [_difference(row["cells"][kind]) for kind in kinds]
        lines.append(f"| {row['recipe']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _difference(value: float) -> str:
    return "0" if value == 0 else "rounding" if value < 1e-5 else f"{100 * value:.2g} %"
