"""Models, tokenizers and metrics of the tasks a recipe file can name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tightfit.train.data import TaskData
    from tightfit.train.recipe_file import RecipeFile


class PrimaryMetric(NamedTuple):
    """The metric a table shows for a task, as `compute_metrics` names it."""

    name: str
    greater_is_better: bool


def build_tokenizer(file: RecipeFile) -> PreTrainedTokenizerBase:
    """The model's tokenizer (image-classification: its image processor). Raises: RecipeError."""
    raise NotImplementedError


def build_model(file: RecipeFile, data: TaskData) -> PreTrainedModel:
    """The stock model with the task's head; weights in fp32, `train.seed` set before the head is created.

    `precision: bf16` / `fp16` keep the fp32 weights and mean autocast, as in `TrainingArguments(bf16=True)`.
    """
    raise NotImplementedError


def metrics_for(data: TaskData) -> Callable[[Any], dict[str, float]]:
    """The task's `compute_metrics` for `transformers.Trainer`."""
    raise NotImplementedError


def preprocess_logits_for(data: TaskData) -> Callable[[Any, torch.Tensor], Any] | None:
    """The task's `preprocess_logits_for_metrics`, so that evaluation never keeps rows x vocabulary logits."""
    raise NotImplementedError


def primary_metric(data: TaskData) -> PrimaryMetric:
    """The metric that stands for the task in tables."""
    raise NotImplementedError
