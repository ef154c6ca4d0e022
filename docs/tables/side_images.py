from __future__ import annotations

from typing import Any

from tables import footer, grid, spread


def table(result: dict[str, Any]) -> str:
    rows = []
    for recipe in dict.fromkeys(row["recipe"] for row in result["rows"]):
        own = [row for row in result["rows"] if row["recipe"] == recipe]
        rows.append([recipe, f"{own[0]['trainable_parameters']:,}", spread([row["accuracy"] for row in own])])
    return grid(["recipe", "parameters that train", "accuracy (range over seeds)"], rows) + "\n" + footer(result)
