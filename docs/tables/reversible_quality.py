from __future__ import annotations

from typing import Any

from tables import footer, grid, spread


def table(result: dict[str, Any]) -> str:
    own = [row for row in result["rows"] if "plain_loss" in row]
    rows = []
    for recipe in dict.fromkeys(row["recipe"] for row in own):
        found = [row for row in own if row["recipe"] == recipe]
        plain = [row["plain_loss"] for row in found if row["plain_loss"] is not None]
        rows.append([recipe, spread([row["loss"] for row in found]), spread(plain) if plain else "-"])
    header = ["recipe", "held-out loss (range over seeds)", "the same of the exported plain model"]
    return grid(header, rows) + "\n" + footer(result)


def start(result: dict[str, Any]) -> str:
    found = {(row["start"], row["recipe"]): row for row in result["rows"] if "start" in row}
    rows = []
    for recipe in dict.fromkeys(recipe for _, recipe in found):
        language, sentences = (found.get((model, recipe), {}) for model in ("stories260k", "MiniLM"))
        cells = [language.get("divergence"), language.get("loss"), sentences.get("divergence")]
        rows.append([recipe, *("-" if cell is None else f"{cell:.4f}" for cell in cells)])
    header = ["recipe", "Llama: KL to stock per token", "Llama: loss", "MiniLM: 1 - cosine to stock"]
    return grid(header, rows) + "\n" + footer(result)
