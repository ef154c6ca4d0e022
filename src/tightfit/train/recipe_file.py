"""Recipe files: one YAML file that names model, task, data, methods and training, checked before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from tightfit.core.recipe import Recipe

Task = Literal[
    "sequence-classification",
    "token-classification",
    "question-answering",
    "causal-lm",
    "seq2seq-lm",
    "image-classification",
]
Name = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(gt=0)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class DataSection(_Section):
    """Where the rows come from and which columns they are in."""

    train: Name
    eval: Name | None = None
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    text: list[Name] | None = None
    label: Name | None = None
    target: Name | None = None
    tags: Name | None = None
    columns: list[Name] | None = None
    rows: Count | None = None
    eval_rows: Count | None = None
    format: Literal["tsv", "csv", "jsonl", "json", "parquet", "conll", "txt"] | None = None
    subset: Name | None = None
    regression: bool | None = None
    packed: bool | None = None


class TrainSection(_Section):
    """How the model is trained; the names follow `transformers.TrainingArguments` where they mean the same."""

    epochs: Annotated[float, Field(gt=0)] = 3.0
    max_steps: Count | None = None
    batch_size: Count = 32
    eval_batch_size: Count | None = None
    gradient_accumulation: Count = 1
    learning_rate: Annotated[float, Field(gt=0)] = 2e-5
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    optimizer: Literal["adamw", "sgd", "adafactor"] = "adamw"
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    max_length: Count = 128
    max_target_length: Count | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    eval_every: Count | None = None
    save_every: Count | None = None
    logging_steps: Count = 10


class RecipeFile(_Section):
    """A whole recipe file with its defaults filled in."""

    model: Name
    task: Task
    data: DataSection
    methods: list[dict[str, dict[str, Any]]] = []
    train: TrainSection = TrainSection()
    output: Path

    @property
    def recipe(self) -> Recipe:
        """The methods as a `Recipe`. Raises: RecipeError."""
        from tightfit.core.recipe import Recipe

        return Recipe.from_list(self.methods)


def read_recipe_file(path: str | Path, overrides: Sequence[str] = ()) -> RecipeFile:
    """Read, check and complete a recipe file. Raises: RecipeError, one line with file, line and key."""
    raise NotImplementedError


def write_recipe_file(recipe_file: RecipeFile, path: str | Path) -> None:
    """Write the file with all defaults filled in, atomically."""
    raise NotImplementedError
