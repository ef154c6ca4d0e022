"""Recipe files of the benchmarks' real tasks: the embedded MiniLM on the shared data."""

from __future__ import annotations

import csv
import gzip
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
    """The recipe file of one run; paths of `data` are below the shared data folder.

    `scale` among `data` multiplies the scores of a regression, in copies of the files beside `output`.
    """
    from tightfit.train.recipe_file import RecipeFile

    section = {k: str(record.SHARED / "data" / v) if k in ("train", "eval") else v for k, v in data.items()}
    if "scale" in section:
        scale, at = section.pop("scale"), section["columns"].index(section["label"])
        for part in ("train", "eval"):
            section[part] = str(_scaled(Path(section[part]), output.parent / f"{part}.csv", at, scale))
    return RecipeFile.model_validate(
        {"model": model, "task": task, "data": section, "methods": methods, "train": train, "output": str(output)}
    )


def _scaled(source: Path, target: Path, at: int, scale: float) -> Path:
    """A CSV file with one of its columns multiplied."""
    with gzip.open(source, "rt", newline="") as file:
        rows = [[*row[:at], float(row[at]) * scale, *row[at + 1 :]] for row in csv.reader(file)]
    with target.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return target
