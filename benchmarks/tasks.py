"""Recipe files of the benchmarks' real tasks: the embedded MiniLM on the shared data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import record

SST2: dict[str, Any] = {
    "train": "sst2/train.tsv.gz",
    "eval": "sst2/dev.tsv",
    "text": ["sentence"],
    "label": "label",
}


def sts_benchmark(language: str) -> dict[str, Any]:
    """The data section of STS-B in a language: a regression on pairs of sentences."""
    return {
        "train": f"stsb_multi/stsb-{language}-train.csv.gz",
        "eval": f"stsb_multi/stsb-{language}-dev.csv.gz",
        "columns": ["first", "second", "score"],
        "text": ["first", "second"],
        "label": "score",
        "regression": True,
    }


def recipe_file(
    data: dict[str, Any],
    methods: list[Any],
    train: dict[str, Any],
    output: Path,
    *,
    task: str = "sequence-classification",
    model: str = "demo:minilm",
):
    """The recipe file of one run; paths of `data` are below the shared data folder."""
    from tightfit.train.recipe_file import RecipeFile

    section = {k: str(record.SHARED / "data" / v) if k in ("train", "eval") else v for k, v in data.items()}
    return RecipeFile.model_validate(
        {"model": model, "task": task, "data": section, "methods": methods, "train": train, "output": str(output)}
    )
