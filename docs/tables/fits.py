from __future__ import annotations

from typing import Any

from tables import footer, grid

KINDS = {"rows": "rows of {length} tokens", "length": "tokens of one row"}


def table(result: dict[str, Any]) -> str:
    """The largest sizes that real steps reached under the cap, beside stock's and beside the planned ones."""
    found = {(row["recipe"], row["kind"]): row for row in result["rows"]}
    kinds = [kind for kind in KINDS if ("stock", kind) in found]
    lines = []
    for recipe in dict.fromkeys(row["recipe"] for row in result["rows"]):
        cells = []
        for kind in kinds:
            row, stock = found.get((recipe, kind)), found["stock", kind]
            if row is None:
                cells += ["", "", ""]
            else:
                cells += [f"{row['fits']:,}", f"{row['planned']:,}", f"{row['fits'] / stock['fits']:.1f}"]
        lines.append([recipe, *cells])
    names = [KINDS[kind].format(length=result["config"]["length"]) for kind in kinds]
    header = [part for name in names for part in (name, "planned", "of stock's")]
    return grid(["recipe", *header], lines) + "\n" + footer(result)
