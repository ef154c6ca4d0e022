"""Finding a recipe that fits a memory budget.

Every method offers values worth trying (`Transform.candidates`). The search simulates them alone and together, at
the whole batch first and then in smaller micro-batches that add up to it, keeps what fits, and puts the recipes that
compute the stock gradients before those that do not, then the faster before the slower.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from tightfit.core.budget import parse_budget
from tightfit.core.calibrate import coefficients
from tightfit.core.errors import BudgetError, SimulationError, StateError, UnsupportedModelError
from tightfit.core.plan import Plan, mib, plan
from tightfit.core.recipe import Recipe, as_recipe, chain, method_classes
from tightfit.core.timing import Coefficients, accumulated, step_time
from tightfit.core.transform import Transform

Batch = dict[str, torch.Tensor] | tuple[int, int]

MARGIN = 0.003
"""A prediction may be this much under what is measured; a recipe fits only with that much to spare."""
INDIFFERENT = 0.02
"""Predicted times closer than this are alike: the simpler recipe goes first."""
MOST_TRANSFORMS = 3


@dataclasses.dataclass(frozen=True)
class Choice:
    """One recipe that fits.

    Attributes:
        recipe: what to apply.
        plan: what it costs at `batch_size`.
        relative_step_time: predicted time of one optimizer step over that of the stock model at the whole batch.
        why: what it gives up for what, in a line.
        batch_size, accumulation: rows per micro-batch and micro-batches per optimizer step.
    """

    recipe: Recipe
    plan: Plan
    relative_step_time: float
    why: str
    batch_size: int
    accumulation: int

    def __str__(self) -> str:
        return f"{self.recipe!r}: {self.why}"


def recommend(
    model: nn.Module,
    *,
    batch: Batch,
    budget: str | int,
    optimizer: str | Callable = "adamw",
    allow_approximate: bool = True,
    allow_lora: bool = True,
    methods: Sequence[type[Transform] | Transform] | None = None,
    vocabulary: Transform | None = None,
    effective_batch: int | None = None,
    limit: int = 3,
    device: str = "cpu",
    elsewhere: bool = False,
    **options: Any,
) -> list[Choice]:
    """Recipes whose training step fits a memory budget, best first.

    Exact recipes, whose gradients are the stock ones, go before the others; within both the faster goes first. If
    exact ones would take all places and another is faster, it gets the last place. Batches that do not fit whole are
    cut into equal micro-batches with accumulated gradients.

    Args:
        model: a real model or a `skeleton`; not changed.
        batch: a dict of tensors, or (batch size, length) for a padded batch.
        budget: "8GiB", "500 MB", or bytes: for everything the allocator holds, weights and optimizer included.
        optimizer: as for `plan`.
        allow_approximate: allow methods that change the gradients.
        allow_lora: allow methods that freeze the model's own weights and train something smaller.
        methods: method classes to choose from, or values that are tried as they stand; default: all that offer
            candidates.
        vocabulary: a vocabulary reduction with its ids filled in, tried as one more method.
        effective_batch: rows per optimizer step; default: the rows of `batch`.
        limit: most choices returned.
        device: "cpu" or "cuda".
        elsewhere: the budget is for another machine, so this one's memory does not bound it.
        **options: further options of `plan`: `clip`, `autocast`, `loss`, ...

    Raises:
        BudgetError: a malformed budget, one above this machine's memory, or nothing fits: then the message names the
            smallest peak found, its recipe, and what would fit.
        SimulationError: the stock step cannot be simulated.
        ValueError: a malformed batch or effective batch.

    Example:
        >>> import tightfit
        >>> from transformers import BertConfig
        >>> model = tightfit.skeleton(BertConfig(num_hidden_layers=2), task="sequence-classification")
        >>> for choice in tightfit.recommend(model, batch=(16, 128), budget="700MiB"):
        ...     print(choice.recipe, choice.batch_size)  # doctest: +SKIP
    """
    limit_bytes = parse_budget(budget, device=device, elsewhere=elsewhere)
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise ValueError(f"limit: got {limit!r}, accepted is an int >= 1")
    search = _Search(model, batch, limit_bytes, effective_batch, dict(optimizer=optimizer, device=device, **options))
    groups = _groups(model, methods, vocabulary, allow_approximate, allow_lora)
    found = search.run(groups)
    if not found:
        raise search.failure(budget)
    return _best(found, limit)


def need(found: Plan) -> int:
    """Bytes a plan may take at worst."""
    slack = found.simulation.slack_bytes if found.simulation is not None else 0
    return round((found.peak_bytes + slack) * (1 + MARGIN))


# -- the candidates ---------------------------------------------------------------------------------------------------


def _groups(model, methods, vocabulary, allow_approximate: bool, allow_lora: bool) -> list[list[Transform]]:
    """Per method the values to try, the mildest first; a recipe takes at most one of each."""
    offered: list[list[Transform]] = []
    items: Iterable[Any] = method_classes().values() if methods is None else methods
    for item in [*items, *([] if vocabulary is None else [vocabulary])]:
        if isinstance(item, Transform):
            missing = item.unfilled()
            if missing:
                raise ValueError(f"{type(item).__name__}: {missing}")
            offered.append([item])
        elif isinstance(item, type) and issubclass(item, Transform):
            offered.append(list(item.candidates(model)))
        else:
            raise TypeError(f"methods: got {item!r}, accepted are method classes and their values")
    groups = []
    for values in offered:
        allowed = [t for t in values if (allow_lora if _freezes(t, model) else t.is_exact() or allow_approximate)]
        if allowed:
            groups.append(allowed)
    return groups


def _freezes(transform: Transform, model: nn.Module) -> bool:
    return next(iter(transform.freezes(model)), None) is not None


@dataclasses.dataclass(frozen=True)
class _Fit:
    recipe: Recipe
    plan: Plan
    size: int
    turns: int
    time: float


class _Search:
    """Simulates recipes at one budget and remembers the smallest peak seen."""

    def __init__(self, model, batch: Batch, budget: int, effective: int | None, options: dict[str, Any]):
        self.model, self.batch, self.budget, self.options = model, batch, budget, options
        self.rows = _rows(batch)
        self.effective = self.rows if effective is None else effective
        if isinstance(self.effective, bool) or not isinstance(self.effective, int) or self.effective < 1:
            raise ValueError(f"effective_batch: got {effective!r}, accepted is an int >= 1")
        top = self.effective if isinstance(batch, tuple) else min(self.rows, self.effective)
        self.sizes = [n for n in range(1, top + 1) if self.effective % n == 0]
        self.smallest: tuple[int, Recipe, int] | None = None
        self.coefficients: Coefficients = coefficients()

    def run(self, groups: list[list[Transform]]) -> list[_Fit]:
        """Everything that fits, times relative to the stock step at the whole batch."""
        stock = self._plan(Recipe(), self.sizes[-1])
        self.stock_time = self._time(stock, self.effective // self.sizes[-1])
        found: list[_Fit] = []
        alone: dict[int, float] = {}
        first = self._fit(Recipe(), stock)
        if first is not None:
            found.append(first)
        whole: list[frozenset[int]] = [frozenset()] if first is not None and first.size == self.sizes[-1] else []
        for count in range(1, MOST_TRANSFORMS + 1):
            for picked in itertools.combinations(range(len(groups)), count):
                names = frozenset(picked)
                # a method that only costs time adds nothing to a recipe that fits the whole batch without it
                if any(names - {i} in whole and alone.get(i, 0.0) > 1 for i in picked if count > 1):
                    whole.append(names)
                    continue
                fit = self._first_fit([groups[i] for i in picked], alone, picked[0] if count == 1 else None)
                if fit is not None:
                    found.append(fit)
                    if fit.size == self.sizes[-1]:
                        whole.append(names)
        return found

    def _first_fit(self, groups: list[list[Transform]], alone: dict[int, float], single: int | None) -> _Fit | None:
        """The mildest values of these methods that fit together: all first ones, all second ones, and so on."""
        for turn in range(max(map(len, groups))):
            recipe = chain(*(group[min(turn, len(group) - 1)] for group in groups))
            try:
                whole = self._plan(recipe, self.sizes[-1])
                if whole.conflicts:
                    return None
                if single is not None and turn == 0:
                    alone[single] = self._time(whole, self.effective // self.sizes[-1]) / self.stock_time
                fit = self._fit(recipe, whole)
            except (SimulationError, UnsupportedModelError, StateError, ValueError):
                return None  # this method does not work on this model; others may
            if fit is not None:
                return fit
        return None

    def _fit(self, recipe: Recipe, whole: Plan) -> _Fit | None:
        """The largest micro-batch at which the recipe fits; `whole` is its plan at the largest one."""
        if self._fits(whole, recipe, self.sizes[-1]):
            return self._made(recipe, whole, self.sizes[-1])
        low, high = 0, len(self.sizes) - 1
        if high == 0 or whole.simulation.static_bytes > self.budget:
            return None
        best = self._plan(recipe, self.sizes[0])
        if not self._fits(best, recipe, self.sizes[0]):
            return None
        below, above = need(best), need(whole)
        while high - low > 1:
            span = (self.budget - below) / max(1, above - below)
            wanted = self.sizes[low] + span * (self.sizes[high] - self.sizes[low])
            middle = max(i for i in range(low, high) if self.sizes[i] <= max(wanted, self.sizes[low]))
            middle = min(max(middle, low + 1), high - 1)
            tried = self._plan(recipe, self.sizes[middle])
            if self._fits(tried, recipe, self.sizes[middle]):
                low, best, below = middle, tried, need(tried)
            else:
                high, above = middle, need(tried)
        return self._made(recipe, best, self.sizes[low])

    def _fits(self, found: Plan, recipe: Recipe, size: int) -> bool:
        taken = need(found)
        if self.smallest is None or taken < self.smallest[0]:
            self.smallest = (taken, recipe, size)
        return taken <= self.budget

    def _made(self, recipe: Recipe, found: Plan, size: int) -> _Fit:
        turns = self.effective // size
        return _Fit(recipe, found, size, turns, self._time(found, turns) / self.stock_time)

    def _plan(self, recipe: Recipe, size: int) -> Plan:
        turns = min(2, self.effective // size)  # a third micro-batch takes what the second one took
        return plan(self.model, recipe, batch=_cut(self.batch, size), accumulate=turns, **self.options)

    def _time(self, found: Plan, turns: int) -> float:
        return accumulated(step_time(found.simulation, self.coefficients), turns / min(2, turns))

    def failure(self, budget: str | int) -> BudgetError:
        """Why nothing fits, and what would."""
        assert self.smallest is not None, "the stock step is always tried"
        smallest, recipe, size = self.smallest
        message = (
            f"budget: no recipe fits {budget!r} ({mib(self.budget)}); the smallest peak found is {mib(smallest)}, of "
            f"{recipe!r} with {size} row{'s' if size > 1 else ''} at a time"
        )
        shorter = self._shorter(recipe)
        if shorter is not None:
            return BudgetError(f"{message}; with it, sequences of {shorter} tokens would fit")
        return BudgetError(f"{message}; give at least that much, allow more methods, or take a smaller model")

    def _shorter(self, recipe: Recipe) -> int | None:
        ids = self.batch.get("input_ids") if isinstance(self.batch, dict) else None
        length = self.batch[1] if isinstance(self.batch, tuple) else (ids.shape[1] if ids is not None else 0)
        while length > 16:
            length //= 2
            try:
                found = plan(self.model, recipe, batch=(1, length), accumulate=min(2, self.effective), **self.options)
            except (SimulationError, ValueError):
                return None
            if need(found) <= self.budget:
                return length
        return None


def _rows(batch: Batch) -> int:
    if isinstance(batch, dict):
        sizes = {v.shape[0] for v in batch.values() if torch.is_tensor(v) and v.dim() > 0}
        if len(sizes) != 1:
            raise ValueError(f"batch: its tensors have {sorted(sizes) or 'no'} rows, accepted is one number of rows")
        return sizes.pop()
    from tightfit.core.plan import describe_batch

    describe_batch(batch)
    return batch[0]


def _cut(batch: Batch, size: int) -> Batch:
    """The most demanding `size` rows of a batch: those with the fewest padded positions."""
    if isinstance(batch, tuple):
        return (size, batch[1])
    mask = batch.get("attention_mask")
    rows = _rows(batch)
    if size == rows:
        return batch
    order = mask.flatten(1).sum(1).argsort(descending=True, stable=True) if mask is not None else torch.arange(rows)
    return {key: value[order[:size]] if torch.is_tensor(value) else value for key, value in batch.items()}


# -- the order --------------------------------------------------------------------------------------------------------


def _best(found: list[_Fit], limit: int) -> list[Choice]:
    ranked = sorted(found, key=lambda f: (not f.recipe.exact, round(f.time / INDIFFERENT), len(f.recipe), f.turns))
    kept = ranked[:limit]
    others = [f for f in ranked[limit:] if not f.recipe.exact]
    if limit > 1 and others and kept[-1].recipe.exact:
        fastest = min(others, key=lambda f: f.time)
        if fastest.time < kept[0].time * 0.95:
            kept[-1] = fastest
    return [Choice(f.recipe, f.plan, f.time, _why(f), f.size, f.turns) for f in kept]


def _why(fit: _Fit) -> str:
    parts = [f"peak {mib(fit.plan.peak_bytes)}", f"{fit.time:.2f} x the stock step time (predicted)"]
    if not fit.recipe.transforms:
        parts.append("the stock step")
    elif fit.recipe.exact:
        parts.append("the gradients of the stock step")
    parts += [f"{type(t).__name__}: {t.summary}" for t in fit.recipe]
    if fit.turns > 1:
        parts.append(f"the batch in {fit.turns} parts of {fit.size} row{'s' if fit.size > 1 else ''}")
    return "; ".join(parts)
