"""Finding a recipe that fits a memory budget.

Every method offers values worth trying (`Transform.candidates`). They are simulated alone, then together, those that
promise the shortest step first, at the whole batch and then in equal micro-batches that add up to it. What cannot be
among the best is not simulated: more methods and slower than a recipe that fits already, or too large at any batch.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

from torch import nn

from tightfit.core.batch import Batch, cut, length_of, rows_of
from tightfit.core.calibrate import coefficients
from tightfit.core.errors import BudgetError, ConflictError, SimulationError, StateError, UnsupportedModelError
from tightfit.core.plan import Draft, Plan, mib
from tightfit.core.recipe import Recipe, chain
from tightfit.core.timing import accumulated, step_time
from tightfit.core.transform import Transform

MARGIN = {"cpu": 0.003, "cuda": 0.06}
"""A prediction may be this much under what is measured; a recipe fits only with that much to spare."""
FAR_SLOWER = 1.25
"""Once two recipes fit, one that promises to be slower than the better one by more than this is not tried."""
ROUGH = 1.1
"""An estimate of a smaller batch's step may be this much above the truth."""
MOST_TRANSFORMS = 3
MOST_SIMULATIONS = 60
MOST_MORE = 2
"""So many recipes that cannot be the best are simulated where there is no alternative to it yet."""
_REFUSALS = (SimulationError, UnsupportedModelError, StateError, ValueError)

Progress = Callable[[int, int], None]


def need(found: Plan) -> int:
    """Bytes a plan may take at worst: the prediction, what could not be seen, and the margin of its device."""
    slack = found.simulation.slack_bytes if found.simulation is not None else 0
    device = found.source.options.get("device", "cpu") if found.source is not None else "cpu"
    return round((found.peak_bytes + slack) * (1 + (0.0 if found.measured else MARGIN[device])))


def check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"recommend({name}=...): got {value!r}, accepted is an int >= 1")


def freezes(transform: Transform, model: nn.Module) -> bool:
    """Whether a method freezes weights of the model's own."""
    return next(iter(transform.freezes(model)), None) is not None


@dataclasses.dataclass(frozen=True)
class Fit:
    """A recipe that fits, with the micro-batch at which it does."""

    recipe: Recipe
    plan: Plan
    size: int
    turns: int
    time: float


class Search:
    """Simulates recipes on one model, batch and budget; every step at most once."""

    def __init__(
        self,
        model: nn.Module,
        batch: Batch,
        budget: int,
        effective: int | None,
        options: dict[str, Any],
        progress: Progress | None = None,
    ):
        self.model, self.batch, self.budget = model, batch, budget
        self.optimizer, self.options = options.pop("optimizer"), options
        if effective is not None:
            check_count("effective_batch", effective)
        self.effective = rows_of(batch) if effective is None else effective
        top = self.effective if isinstance(batch, tuple) else min(rows_of(batch), self.effective)
        self.sizes = [n for n in range(1, top + 1) if self.effective % n == 0]
        self.plans: dict[tuple[Recipe, int], Plan] = {}
        self.drafts: dict[Recipe, Draft] = {}
        self.coefficients = coefficients()
        self.progress, self.expected = progress, 1

    def run(
        self, groups: list[list[Transform]], limit: int, *, adapters: bool = False, prune: bool = True
    ) -> list[Fit]:
        """What fits, as far as it can be among the best `limit`; all of it without pruning.

        Args:
            groups: per method its values, the mildest first.
            limit: choices wanted.
            adapters: only recipes that freeze the model's own weights.
            prune: leave out what cannot be among the best.

        Raises:
            SimulationError: the stock step cannot be simulated.
        """
        self.expected = 1 + len(groups)
        top = self.sizes[-1]
        self.stock_time = self._seconds(self._plan(Recipe(), top), self.effective // top)
        found: dict[frozenset[int], Fit] = {}
        none: frozenset[int] = frozenset()
        if not adapters and (fit := self._fit(Recipe())) is not None:
            found[none] = fit
        alone = {i: self._ratio(group[0]) for i, group in enumerate(groups)}
        ratios = {i: ratio for i, ratio in alone.items() if ratio is not None}
        queue = [frozenset(c) for n in range(1, MOST_TRANSFORMS + 1) for c in itertools.combinations(ratios, n)]
        freezing: set[int] | None = None
        if adapters:
            freezing = {i for i in ratios if freezes(groups[i][0], self.model)}
            queue = [names for names in queue if names & freezing]
        exact = {names: all(groups[i][0].is_exact() for i in names) for names in queue} | {none: True}
        promise = {names: math.prod(ratios[i] for i in names) for names in queue}
        queue.sort(key=lambda names: (not exact[names], promise[names], len(names)))
        beaten = []
        for at, names in enumerate(queue):
            if prune:
                if len(self.plans) >= MOST_SIMULATIONS:
                    break
                if self._is_beaten(names, promise[names], found, exact, limit):
                    beaten.append(names)
                    continue
            self.expected = len(self.plans) + len(queue) - at
            fit = self._mildest([groups[i] for i in sorted(names)])
            if fit is not None:
                found[names] = fit
        if not found:
            return self._last_resort(groups, freezing)
        tries = 0
        for names in beaten:
            recipe = chain(*(groups[i][0] for i in sorted(names)))
            known = (recipe, self.sizes[-1]) in self.plans
            if not known and (len(found) > 1 or tries == MOST_MORE):
                continue
            tries += not known
            if self._fits_whole(recipe):
                found[names] = self._made(recipe, self.sizes[-1])
        return list(found.values())

    def _ratio(self, transform: Transform) -> float | None:
        """Step time of one method alone, whole batch, as a ratio to stock; None where it does not work on the model."""
        recipe = chain(transform)
        try:
            top = self.sizes[-1]
            return self._seconds(self._plan(recipe, top), self.effective // top) / self.stock_time
        except _REFUSALS:
            return None

    def _is_beaten(self, names, promise: float, found, exact, limit: int) -> bool:
        """Whether a recipe cannot be among the best: slower than a part of itself, or than all that will be shown."""
        if any(other < names and fit.time <= promise for other, fit in found.items()):
            return True
        alike = sorted(fit.time for other, fit in found.items() if exact[other] == exact[names])
        if len(alike) > 1 and promise > FAR_SLOWER * alike[0]:
            return True
        places = limit if exact[names] else max(1, limit - sum(exact[other] for other in found))
        return len(alike) >= places and promise > alike[places - 1]

    def _fits_whole(self, recipe: Recipe) -> bool:
        try:
            return need(self._plan(recipe, self.sizes[-1])) <= self.budget
        except _REFUSALS:
            return False

    def _mildest(self, groups: list[list[Transform]]) -> Fit | None:
        """The mildest values of these methods that fit together: all first ones, all second ones, and so on."""
        before = None
        for turn in range(max(map(len, groups))):
            recipe = chain(*(group[min(turn, len(group) - 1)] for group in groups))
            try:
                if before is not None and not self._may_fit_after(recipe, before):
                    continue
                before = recipe
                fit = self._fit(recipe)
            except _REFUSALS:
                return None  # this method does not work on this model; others may
            if fit is not None:
                return fit
        return None

    def _may_fit_after(self, recipe: Recipe, before: Recipe) -> bool:
        """Whether a stronger value of a recipe that does not fit takes enough away: weights, gradients, two moments."""
        least = min((need(found) for (tried, _), found in self.plans.items() if tried == before), default=0)
        whole = self.plans.get((before, self.sizes[-1]))
        if whole is not None:
            least = min(least, round(estimate(whole.simulation, self.sizes[0] / self.sizes[-1]) / ROUGH))
        gain = self._draft(before).static_bytes - self._draft(recipe).static_bytes
        return least - 3 * gain <= self.budget

    def _fit(self, recipe: Recipe) -> Fit | None:
        """The largest micro-batch at which the recipe fits."""
        top = self.sizes[-1]
        floor = self._draft(recipe).static_bytes
        if floor > self.budget:
            return None
        whole = self._plan(recipe, top)
        if need(whole) <= self.budget:
            return self._made(recipe, top)
        if floor + whole.by_category["optimizer"] > self.budget:
            return None
        smaller = self.sizes[:-1]
        guesses = {n: estimate(whole.simulation, n / top) for n in smaller}
        if not smaller or guesses[smaller[0]] > ROUGH * self.budget:
            return None
        correction, best = 1.0, None
        low, high = 0, len(smaller)
        while low < high:  # smaller[:low] fit, smaller[high:] do not
            at = max((i for i in range(low, high) if guesses[smaller[i]] * correction <= self.budget), default=low)
            found = self._plan(recipe, smaller[at])
            correction = need(found) / guesses[smaller[at]]
            if need(found) <= self.budget:
                best, low = smaller[at], at + 1
                if low < high and guesses[smaller[low]] * correction > ROUGH * self.budget:
                    break
            else:
                high = at
        return None if best is None else self._made(recipe, best)

    def _made(self, recipe: Recipe, size: int) -> Fit:
        found, turns = self._plan(recipe, size), self.effective // size
        return Fit(recipe, found, size, turns, self._seconds(found, turns) / self.stock_time)

    def _draft(self, recipe: Recipe) -> Draft:
        if recipe not in self.drafts:
            self.drafts[recipe] = Draft(self.model, recipe)
        return self.drafts[recipe]

    def _plan(self, recipe: Recipe, size: int) -> Plan:
        """The recipe's step on `size` rows; a third micro-batch takes what the second one took."""
        key = (recipe, size)
        if key not in self.plans:
            draft = self._draft(recipe)
            if draft.conflicts:
                raise ConflictError("; ".join(str(conflict) for conflict in draft.conflicts))
            options = {**self.options, "accumulate": min(2, self.effective // size)}
            self.plans[key] = draft.plan(cut(self.batch, size), self.optimizer, options)
            if self.progress is not None:
                self.progress(len(self.plans), max(self.expected, len(self.plans)))
        return self.plans[key]

    def _seconds(self, found: Plan, turns: int) -> float:
        """Predicted seconds of an optimizer step over `turns` micro-batches, of which up to two were simulated."""
        repeat: Any = turns / min(2, turns)
        return accumulated(step_time(found.simulation, self.coefficients), repeat)

    # -- when nothing fits ------------------------------------------------------------------------------------------

    def _last_resort(self, groups: list[list[Transform]], freezing: set[int] | None) -> list[Fit]:
        """The most frugal recipes at the smallest micro-batch; their plans are what `failure` names."""
        for recipe in self._frugal(groups, freezing):
            try:
                if need(self._plan(recipe, self.sizes[0])) <= self.budget:
                    return [self._made(recipe, self.sizes[0])]
            except _REFUSALS:
                continue
        return []

    def failure(self, budget: str | int) -> BudgetError:
        """Why nothing fits, and what would."""
        (recipe, size), found = min(self.plans.items(), key=lambda item: need(item[1]))
        message = (
            f"budget: no recipe fits {_shown(budget)}; the smallest peak found is {mib(need(found))}, of {recipe} with "
            f"{size} row{'s' if size > 1 else ''} at a time"
        )
        shorter = self._shorter(recipe, found)
        if shorter is not None:
            return BudgetError(f"{message}; with it, sequences of {shorter} tokens would fit")
        return BudgetError(f"{message}; give at least that much, allow more methods, or take a smaller model")

    def _frugal(self, groups: list[list[Transform]], freezing: set[int] | None) -> list[Recipe]:
        """The recipes that hold least beside activations, of those the ones with the most methods."""
        drafts = []
        for count in range(min(len(groups), MOST_TRANSFORMS) + 1):
            for picked in itertools.combinations(range(len(groups)), count):
                if freezing is not None and not freezing.intersection(picked):
                    continue
                recipe = chain(*(groups[i][-1] for i in picked))
                try:
                    draft = self._draft(recipe)
                except _REFUSALS:
                    continue
                if not draft.conflicts and draft.trainable:
                    drafts.append(draft)
        drafts.sort(key=lambda draft: (draft.static_bytes, -len(draft.recipe)))
        return [draft.recipe for draft in drafts[:3]]

    def _shorter(self, recipe: Recipe, found: Plan) -> int | None:
        """The largest half, quarter, ... of the batch's length at which the recipe fits."""
        length = length_of(self.batch)
        options = {**self.options, "accumulate": min(2, self.effective)}
        full, tries = length or 0, 0
        while length is not None and length > 16 and tries < 3:
            length //= 2
            if estimate(found.simulation, length / full) > self.budget:
                continue
            tries += 1
            try:
                shorter = self._draft(recipe).plan((1, length), self.optimizer, options)
            except _REFUSALS:
                return None
            if need(shorter) <= self.budget:
                return length
        return None


def estimate(simulation: Any, share: float) -> int:
    """About what a step takes on `share` of its rows, as a later micro-batch with all gradients there already.

    What belongs to the batch shrinks, the rest stays; a new gradient stands beside the sum it is added to.
    """
    shown = simulation.timeline.categories
    total = max(shown["gradients"], default=0)
    peak = before = 0
    for at, phase in enumerate(simulation.timeline.phases):
        gradients = shown["gradients"][at]
        fixed = shown["weights"][at] + shown["optimizer"][at] + total
        rest = shown["activations"][at] + shown["temporary"][at]
        if phase in ("forward", "backward", "recompute"):
            rest = rest * share + max(0, gradients - before)
        before = gradients
        peak = max(peak, round(fixed + rest))
    return peak


def _shown(budget: str | int) -> str:
    return mib(budget) if isinstance(budget, int) else budget
