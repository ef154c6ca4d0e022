"""Recipe files of the benchmarks' real tasks: the embedded MiniLM on the shared data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import record


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
