"""From a recipe file's data section to tokenised train and eval sets with their collator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

    from tightfit.train.recipe_file import RecipeFile


@dataclass(frozen=True)
class TaskData:
    """Tokenised data of one task."""

    task: str
    train: Dataset
    eval: Dataset
    collator: Callable[[list[dict]], dict]
    fingerprint: str  # sha256 of the raw rows, train and eval
    label_names: tuple[str, ...] | None = None  # classes or tags in the order of their ids
    num_labels: int | None = None
    problem_type: str | None = None  # "regression", "single_label_classification" or None
    train_texts: list[Any] = field(default_factory=list)  # raw input text of each row, for reports
    eval_texts: list[Any] = field(default_factory=list)
    notes: tuple[str, ...] = ()  # what a user should know: truncated rows, how eval was split off
    extra: dict[str, Any] = field(
        default_factory=dict
    )  # what the task's metrics need besides (answers, offsets)


def load_data(file: RecipeFile, tokenizer: Any) -> TaskData:
    """Read, check and tokenise both sets (`tokenizer`: an image processor for images). Raises: DataError."""
    raise NotImplementedError


def longest_batch(data: TaskData, batch_size: int, collator: Callable | None = None) -> dict:
    """Collate the `batch_size` longest training rows: the batch of the memory peak."""
    raise NotImplementedError
