"""How far a recipe reaches in a memory budget: the largest batch, the longest sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from tightfit.core import hfmodel
from tightfit.core.batch import Batch, check_batch, positions
from tightfit.core.budget import parse_budget
from tightfit.core.errors import BudgetError, ConflictError, UnsupportedModelError
from tightfit.core.fitting import need
from tightfit.core.plan import Draft, Plan, check_options, mib
from tightfit.core.recipe import Recipe, as_recipe
from tightfit.core.simulate.batches import task_of
from tightfit.core.transform import Transform

MOST = 1 << 16
"""No batch and no sequence beyond this is tried."""


def largest_batch(
    model: nn.Module,
    recipe: Recipe | Transform | list | tuple | None = None,
    *,
    length: int,
    budget: str | int,
    target_length: int | None = None,
    optimizer: str | Callable = "adamw",
    padded: bool = True,
    elsewhere: bool = False,
    progress: Callable[[int], None] | None = None,
    **options: Any,
) -> int:
    """The most rows of `length` tokens whose training step fits `budget` under `recipe`.

    Args:
        model, recipe, optimizer, **options: as for `plan`.
        length: tokens per row.
        target_length: tokens per target of an encoder-decoder; default: as many.
        padded: rows are padded to that length, as those of ordinary data. False: all are full (packed data), for which
            most models build no mask, so that more rows fit.
        budget, elsewhere: as for `recommend`.
        progress: called with the number of steps simulated.

    Raises:
        BudgetError: a malformed budget, or not even one row fits; names its peak.
        ConflictError: the recipe cannot be applied.
        DataError: a length below 1, or above the model's positions.

    Example:
        >>> import tightfit
        >>> from transformers import BertConfig
        >>> model = tightfit.skeleton(BertConfig(num_hidden_layers=1), task="sequence-classification")
        >>> tightfit.largest_batch(model, tightfit.Lora(), length=64, budget="300MiB", elsewhere=True) > 8
        True
    """
    check_options("largest_batch", options)
    most = parse_budget(budget, device=options.get("device", "cpu"), elsewhere=elsewhere)
    draft = _draft(model, recipe)

    def step(size: int) -> Plan:
        return draft.plan(_batch(draft, (size, length), padded, target_length), optimizer, options)

    return _largest(step, most, MOST, f"one row of {length} tokens under {draft.recipe}", progress)


def longest_sequence(
    model: nn.Module,
    recipe: Recipe | Transform | list | tuple | None = None,
    *,
    batch_size: int,
    budget: str | int,
    target_length: int | None = None,
    optimizer: str | Callable = "adamw",
    padded: bool = True,
    elsewhere: bool = False,
    progress: Callable[[int], None] | None = None,
    **options: Any,
) -> int:
    """The most tokens per row that `batch_size` rows can have under `recipe` and `budget`.

    Never more than the model has positions for, or was made for (`max_position_embeddings` of its config).

    Args:
        model, recipe, optimizer, **options: as for `plan`.
        batch_size: rows.
        target_length: as for `largest_batch`.
        padded: as for `largest_batch`. False also for single rows that are not padded.
        budget, elsewhere: as for `recommend`.
        progress: called with the number of steps simulated.

    Raises:
        BudgetError: a malformed budget, or not even one token fits; names its peak.
        ConflictError: the recipe cannot be applied.
        DataError: a batch size below 1.
        UnsupportedModelError: a model of images, whose rows have one size.

    Example:
        >>> import tightfit
        >>> from transformers import BertConfig
        >>> model = tightfit.skeleton(BertConfig(num_hidden_layers=1), task="sequence-classification")
        >>> tightfit.longest_sequence(model, batch_size=1, budget="2GiB")
        512
    """
    check_options("longest_sequence", options)
    most = parse_budget(budget, device=options.get("device", "cpu"), elsewhere=elsewhere)
    draft = _draft(model, recipe)
    if task_of(model) == "image":
        raise UnsupportedModelError(
            f"longest_sequence(): {type(model).__name__} takes images, not sequences of tokens; ask for largest_batch()"
        )
    made_for = getattr(hfmodel.text_config(model), "max_position_embeddings", None)
    top = min(n for n in (positions(model), made_for, MOST) if isinstance(n, int) and n > 0)

    def step(length: int) -> Plan:
        return draft.plan(_batch(draft, (batch_size, length), padded, target_length), optimizer, options)

    rows = f"{batch_size} row{'s' if batch_size > 1 else ''}"
    return _largest(step, most, top, f"{rows} of one token under {draft.recipe}", progress)


def _draft(model: nn.Module, recipe: Any) -> Draft:
    draft = Draft(model, as_recipe(recipe))
    if draft.conflicts:
        raise ConflictError("; ".join(str(conflict) for conflict in draft.conflicts))
    return draft


def _batch(draft: Draft, size: tuple[int, int], padded: bool, target_length: int | None) -> Batch:
    if padded and target_length is None:
        return size
    check_batch(draft.model, size, long_rows=draft.recipe.long_rows)
    return draft.recipe.example(draft.model, *size, padded=padded, target_length=target_length)


def _largest(
    step: Callable[[int], Plan], budget: int, top: int, what: str, progress: Callable[[int], None] | None
) -> int:
    """The largest size up to `top` that fits: it was simulated, and so was the next one, which does not.

    Sizes to try come from the steps simulated so far, whose part that belongs to the batch is taken to grow with it.
    """
    count = 0

    def tried(size: int) -> tuple[int, int]:
        nonlocal count
        found = step(size)
        count += 1
        if progress is not None:
            progress(count)
        return need(found), size + round(size * room(found, budget))

    low, high, below, above, shrunk = 0, top + 1, 0, 0, 0
    guess = min(8, top)
    while high - low > 1:
        # a guess from few rows is rough, and a step a hundred times larger takes long to be refused
        size = min(max(guess, low + 1), high - 1, 16 * max(1, low))
        taken, guess = tried(size)
        if taken <= budget:
            low, below = size, taken
        else:
            high, above = size, taken
        if size == 1 and taken > budget:
            raise BudgetError(
                f"budget: {mib(budget)} does not hold {what}, whose peak is {mib(taken)}; give at least that, or a "
                f"recipe that needs less"
            )
        if taken > budget:
            shrunk = guess
        if above:  # peaks grow at least in proportion, so both of these are on the safe side
            line = low + int((high - low) * (budget - below) / (above - below)) if low else 1
            guess = max(line, min(shrunk, high - 1))
    return low


def room(found: Plan, budget: int) -> float:
    """By what share the batch of a simulated step can grow (or, negative, must shrink) to meet a budget."""
    shown = found.simulation.timeline.categories
    least = float("inf")
    spare = budget - (need(found) - found.peak_bytes)
    for at, phase in enumerate(found.simulation.timeline.phases):
        rest = shown["activations"][at] + shown["temporary"][at]
        if phase not in ("forward", "backward", "recompute") or rest == 0:
            continue
        fixed = shown["weights"][at] + shown["optimizer"][at] + shown["gradients"][at]
        least = min(least, (spare - fixed) / rest)
    return min(least, MOST) - 1
