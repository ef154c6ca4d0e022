"""How far a recipe reaches in a memory budget: the largest batch, the longest sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from tightfit.core.budget import parse_budget
from tightfit.core.errors import BudgetError
from tightfit.core.plan import mib, plan
from tightfit.core.recipe import Recipe, as_recipe
from tightfit.core.search import need
from tightfit.core.transform import Transform


def largest_batch(
    model: nn.Module,
    recipe: Recipe | Transform | list | tuple | None = None,
    *,
    length: int,
    budget: str | int,
    optimizer: str | Callable = "adamw",
    device: str = "cpu",
    elsewhere: bool = False,
    **options: Any,
) -> int:
    """The most rows of `length` tokens whose training step fits `budget` under `recipe`.

    Raises:
        BudgetError: a malformed budget, or not even one row fits; names its peak.

    Example:
        >>> import tightfit
        >>> from transformers import BertConfig
        >>> model = tightfit.skeleton(BertConfig(num_hidden_layers=2), task="sequence-classification")
        >>> tightfit.largest_batch(model, tightfit.Lora(), length=64, budget="300MiB")  # doctest: +SKIP
        34
    """
    recipe = as_recipe(recipe)
    most = parse_budget(budget, device=device, elsewhere=elsewhere)

    def peak(size: int) -> int:
        return need(plan(model, recipe, batch=(size, length), optimizer=optimizer, device=device, **options))

    return _largest(peak, most, 1 << 20, f"one row of {length} tokens under {recipe}")


def longest_sequence(
    model: nn.Module,
    recipe: Recipe | Transform | list | tuple | None = None,
    *,
    batch_size: int,
    budget: str | int,
    optimizer: str | Callable = "adamw",
    device: str = "cpu",
    elsewhere: bool = False,
    **options: Any,
) -> int:
    """The most tokens per row that `batch_size` rows can have under `recipe` and `budget`, up to the model's positions.

    Raises:
        BudgetError: a malformed budget, or not even one token fits; names its peak.
    """
    recipe = as_recipe(recipe)
    most = parse_budget(budget, device=device, elsewhere=elsewhere)
    config = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    positions = getattr(text, "max_position_embeddings", None) or 1 << 20
    if getattr(text, "model_type", "") in ("roberta", "xlm-roberta", "camembert"):
        positions -= text.pad_token_id + 1  # these count positions from the padding id on

    def peak(length: int) -> int:
        return need(plan(model, recipe, batch=(batch_size, length), optimizer=optimizer, device=device, **options))

    return _largest(peak, most, positions, f"{batch_size} rows of one token under {recipe}")


def _largest(peak: Callable[[int], int], budget: int, top: int, what: str) -> int:
    """The largest size up to `top` whose peak fits, where the peak grows with the size."""
    low, low_peak = 1, peak(1)
    if low_peak > budget:
        raise BudgetError(
            f"budget: {mib(budget)} does not hold {what}, whose peak is {mib(low_peak)}; give at least that, or a "
            f"recipe that needs less"
        )
    guess = min(8, top)
    high, high_peak = top + 1, None
    while high - low > 1:
        guess = min(max(guess, low + 1), high - 1)
        found = peak(guess)
        if found <= budget:
            slope = (found - low_peak) / (guess - low)
            low, low_peak = guess, found
            guess = low + int((budget - found) / slope) if slope > 0 else 4 * low
            if high_peak is not None and (guess <= low or guess >= high):
                guess = (low + high) // 2
            continue
        high, high_peak = guess, found
        guess = low + int((high - low) * (budget - low_peak) / (high_peak - low_peak))
        if guess <= low or guess >= high:
            guess = (low + high) // 2
    return low
