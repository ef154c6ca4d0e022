"""Recommended recipes: the ones that fit, in the order a user wants them, each with what it gives up."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from tightfit.core import hfmodel
from tightfit.core.batch import Batch, check_batch
from tightfit.core.budget import parse_budget
from tightfit.core.fields import near
from tightfit.core.fitting import Fit
from tightfit.core.plan import Plan, check_options, mib
from tightfit.core.recipe import Recipe, method_classes
from tightfit.core.search import INDIFFERENT, Progress, Search, check_count, freezes
from tightfit.core.transform import Transform

TUNE = ("any", "full", "adapters")


@dataclasses.dataclass(frozen=True)
class Choice:
    """One recipe that fits.

    Attributes:
        recipe: what to apply.
        plan: what it costs at `batch_size`, gradients accumulated where `accumulation` is above 1.
        relative_step_time: predicted time of one optimizer step over that of the stock model at the whole batch.
        why: what it gives, what it gives up and for what, in a line.
        batch_size, accumulation: rows per micro-batch and micro-batches per optimizer step.
    """

    recipe: Recipe
    plan: Plan
    relative_step_time: float
    why: str
    batch_size: int
    accumulation: int

    def __str__(self) -> str:
        return f"{self.recipe}: {self.why}"

    def to_dict(self) -> dict[str, Any]:
        """The choice as JSON values."""
        return {
            "recipe": self.recipe.to_list(),
            "exact": self.recipe.exact,
            "batch_size": self.batch_size,
            "accumulation": self.accumulation,
            "peak_bytes": self.plan.peak_bytes,
            "relative_step_time": self.relative_step_time,
            "why": self.why,
        }


def recommend(
    model: nn.Module,
    *,
    batch: Batch,
    budget: str | int,
    optimizer: str | Callable = "adamw",
    tune: str = "any",
    exact: bool = False,
    methods: Sequence[type[Transform] | Transform] | None = None,
    extra: Sequence[Transform] = (),
    effective_batch: int | None = None,
    limit: int = 3,
    elsewhere: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> list[Choice]:
    """Recipes whose training step fits a memory budget, best first.

    Exact recipes, whose gradients are those of the stock step, go before the others; within both the faster goes first,
    and of those whose predicted times are alike within the prediction's own error the simpler.
    If exact ones would take all places and another is faster, it gets the last place. A batch that does not fit whole
    is cut into equal micro-batches with accumulated gradients.

    Args:
        model: a real model or a `skeleton`; not changed.
        batch: a dict of tensors, best the longest rows of the data, or (batch size, length) for a padded batch.
        budget: "8GiB", "500 MB", or bytes: for everything the allocator holds, weights and optimizer included.
        optimizer: as for `plan`.
        tune: "full" trains all of the model's own weights, "adapters" freezes them and trains something smaller (LoRA),
            "any" allows both.
        exact: allow only recipes whose gradients are those of the stock step.
        methods: method classes to choose from, or values that are tried as they stand, such as `Lora(rank=32)`;
            default: all methods that offer candidates.
        extra: values that the model alone cannot offer, such as a vocabulary with its ids, tried beside `methods`.
        effective_batch: rows per optimizer step; default: the rows of `batch`.
        limit: most choices returned.
        elsewhere: the budget is for another machine, so this one's memory does not bound it.
        progress: called with the number of steps simulated and the number still expected.
        **options: as for `plan`, but for `accumulate` and `train`.

    Raises:
        BudgetError: a malformed budget, one above this machine's memory, or nothing fits: then the message names the
            smallest peak found, its recipe, and what would fit.
        DataError: a malformed batch, or one that the model cannot be called with.
        SimulationError: the stock step cannot be simulated.
        ValueError, TypeError: another argument is wrong, or only adapters are allowed and no method makes one.

    Example:
        >>> import tightfit
        >>> from transformers import BertConfig
        >>> model = tightfit.skeleton(BertConfig(num_hidden_layers=1), task="sequence-classification")
        >>> methods = [tightfit.Checkpointing, tightfit.Lora(rank=32)]
        >>> for choice in tightfit.recommend(model, batch=(16, 64), budget="800MiB", tune="full", methods=methods):
        ...     print(choice.recipe, choice.batch_size, choice.accumulation)
        stock 16 1
        Checkpointing 16 1
    """
    for name in ("accumulate", "fallback", "train"):
        if name in options:
            raise TypeError(f"recommend({name}=...): not an option here; see effective_batch for accumulation")
    check_options("recommend", options)
    if tune not in TUNE:
        raise ValueError(f"recommend(tune=...): got {tune!r}, accepted are {', '.join(TUNE)}{near(tune, TUNE)}")
    check_count("limit", limit)
    hfmodel.check_module(model, "recommend")
    most = parse_budget(budget, device=options.get("device", "cpu"), elsewhere=elsewhere)
    check_batch(model, batch)
    groups = candidates(model, methods, extra, tune, exact)
    search = Search(model, batch, most, effective_batch, dict(options, optimizer=optimizer), progress)
    while found := search.run(groups, limit, adapters=tune == "adapters"):
        chosen = best_first(found, limit)
        checked = {fit: search.fitting.checked(fit) for fit in chosen}
        if all(checked.values()):
            return choices([fit for fit in checked.values() if fit is not None])
        # not all that may fit instead was looked at: the search goes on, with what is known now
    raise search.failure(budget)


def candidates(model: nn.Module, methods, extra, tune: str, exact: bool) -> list[list[Transform]]:
    """Per method the values to try, the one that gives up least first; a recipe takes at most one of each."""
    offered: list[list[Transform]] = []
    items: Iterable[Any] = method_classes().values() if methods is None else methods
    for item in [*items, *extra]:
        if isinstance(item, Transform):
            missing = item.unfilled()
            if missing:
                raise ValueError(f"{type(item).__name__}: {missing}")
            offered.append([item])
        elif isinstance(item, type) and issubclass(item, Transform):
            offered.append(list(item.candidates(model)))
        else:
            raise TypeError(f"recommend(methods=...): got {item!r}, accepted are method classes and their values")
    allowed = [
        [t for t in values if (t.is_exact() or not exact) and (tune != "full" or not freezes(t, model))]
        for values in offered
    ]
    return [values for values in allowed if values]


def best_first(found: list[Fit], limit: int) -> list[Fit]:
    """The fits to show, exact ones first and within both the faster first."""
    exact, others = ([f for f in found if f.recipe.exact is wanted] for wanted in (True, False))
    ranked = [*_fast_and_simple(exact), *_fast_and_simple(others)]
    kept = ranked[:limit]
    others = [f for f in ranked[limit:] if not f.recipe.exact]
    if limit > 1 and others and kept[-1].recipe.exact:
        fastest = min(others, key=lambda f: f.time)
        if fastest.time < kept[0].time * 0.95:
            kept[-1] = fastest
    return kept


def _fast_and_simple(fits: list[Fit]) -> list[Fit]:
    """The fits, of those nearly as fast as the fastest that is left the simplest first.

    Simple is what approximates little, then what has few methods.
    """
    left, ranked = list(fits), []
    while left:
        alike = min(f.time for f in left) * (1 + INDIFFERENT)
        ranked.append(min((f for f in left if f.time <= alike), key=_complexity))
        left.remove(ranked[-1])
    return ranked


def _complexity(fit: Fit) -> tuple[float, ...]:
    return sum(not t.is_exact() for t in fit.recipe), len(fit.recipe), fit.time, fit.turns


def choices(kept: list[Fit]) -> list[Choice]:
    """What the user sees of the fits."""
    return [Choice(f.recipe, f.plan, f.time, _why(f, kept[0]), f.size, f.turns) for f in kept]


def _why(fit: Fit, best: Fit) -> str:
    parts = [f"peak {mib(fit.plan.peak_bytes)}, {fit.time:.2f} x the stock step time (predicted)"]
    if fit.turns > 1:
        parts.append(f"the batch in {fit.turns} parts of {fit.size} row{'s' if fit.size > 1 else ''}")
    if fit.recipe.exact:
        parts.append("the gradients of the stock step")
    else:
        inexact = "; ".join(t.summary for t in fit.recipe if not t.is_exact())
        parts.append(f"not the gradients of the stock step: {inexact}")
    if fit is not best:
        time, memory = fit.time / best.time - 1, fit.plan.peak_bytes - best.plan.peak_bytes
        speed = f"{abs(time):.0%} {'slower' if time > 0 else 'faster'}" if abs(time) >= 0.005 else "as fast"
        parts.append(f"{speed} and {mib(abs(memory))} {'more' if memory > 0 else 'less'} than the first choice")
    return "; ".join(parts)
