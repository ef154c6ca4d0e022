"""Methods on quantised bases, from the tests that run them."""

from __future__ import annotations


def table(result: dict) -> str:
    """A row for each recipe: how far gradients are from those on the dequantised base."""
    return _grid(result["kinds"], result["rows"], _difference)


def peaks(result: dict) -> str:
    """A row for each recipe: the measured peak of a step, and how far the planned one is from it."""
    return _grid(result["kinds"], result["peaks"], _peak)


def _grid(kinds: list[str], rows: list[dict], show) -> str:
    lines = [f"| recipe | {' | '.join(kinds)} |", "|---|" + "---:|" * len(kinds)]
    for row in rows:
        lines.append(f"| {row['recipe']} | {' | '.join(show(row['cells'][kind]) for kind in kinds)} |")
    return "\n".join(lines)


def _difference(value: float) -> str:
    return "0" if value == 0 else "rounding" if value < 1e-5 else f"{100 * value:.2g} %"


def _peak(cell: dict[str, int]) -> str:
    off = 100 * (cell["planned"] / cell["measured"] - 1)
    return f"{cell['measured'] / 2**20:.2f} MiB, {off:+.3f} %"
