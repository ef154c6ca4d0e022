"""Which methods work on which families of models, from the test that tries them all."""

from __future__ import annotations

from typing import Any

from tables import grid

COLUMNS = {
    "FusedOps": "FusedOps, kept of stock's",
    "FusedOps, Mesa": "Mesa",
    "FusedOps, WtaCrs of all rows": "WtaCrs",
    "TokenTune of all tokens": "TokenTune",
    "Reversible": "Reversible",
    "LadderSide": "LadderSide",
    "Sherl": "Sherl",
    "Losa": "Losa",
    "Lora": "Lora",
    "Checkpointing": "Checkpointing",
}
HEADS = {
    "causal": "Causal language models",
    "masked": "Masked language models",
    "classes": "Classifiers of text",
    "pairs": "Encoder-decoders",
    "images": "Classifiers of images",
}


def table(result: dict[str, Any]) -> str:
    """A table per head, a line per family, a column per method."""
    parts = []
    for head, title in HEADS.items():
        rows = [row for row in result["rows"] if row["head"] == head]
        lines = [[row["kind"], *(_cell(row["found"][name]) for name in COLUMNS)] for row in rows]
        parts.append(f"### {title}\n\n" + grid(["family", *COLUMNS.values()], lines))
    versions = ", ".join(f"{library} {version}" for library, version in result["versions"].items())
    return "\n\n".join([*parts, f"*{versions}.*"])


def counts(result: dict[str, Any]) -> str:
    """How many families each method works on."""
    rows = result["rows"]
    lines = []
    for name, column in COLUMNS.items():
        works = sum(row["found"][name][0] == "yes" for row in rows)
        lines.append([column.partition(",")[0], str(works), str(len(rows) - works)])
    return grid(["method", "works on", "refuses"], lines)


def _cell(found: list) -> str:
    said, more = found
    return "-" if said != "yes" else "yes" if more is None else f"{more:.2f}"
