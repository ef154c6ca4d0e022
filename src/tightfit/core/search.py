"""Finding a recipe that fits a memory budget.

Every method offers values worth trying (`Transform.candidates`). They are simulated alone, then together, those that
promise the shortest step first, at the whole batch and then in equal micro-batches that add up to it. What cannot be
among the best is not simulated: more methods and slower than a recipe that fits already, or too large at any batch.
"""

from __future__ import annotations

import contextlib
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
FAR_SLOWER = 1.15
"""Once two recipes fit, one that promises to be slower than the better one by more than this is not tried."""
ROUGH = 1.1
"""An estimate of a smaller batch's step may be this much above the truth."""
AS_FAST = 0.05
"""Predicted times closer than this may be the other way round."""
MOST_TRANSFORMS = 3
MOST_SIMULATIONS = 60
MOST_MORE = 2
"""So many recipes that cannot be the best are simulated where there is no alternative to it yet."""
_REFUSALS = (SimulationError, UnsupportedModelError, StateError, ValueError)

Progress = Callable[[int, int], None]
Names = frozenset[int]
"""Numbers of the methods in a recipe."""


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
        self.groups: list[list[Transform]] = []
        self.found: dict[Names, Fit] = {}

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
        self.groups, self.found = groups, {}
        stock = self._plan(Recipe(), self.sizes[-1])
        self.stock_time = self._seconds(stock, self.effective // self.sizes[-1])
        self.state_share = stock.by_category["optimizer"] / self._draft(Recipe()).gradient_bytes
        if not adapters and (fit := self._fit(Recipe())) is not None:
            self.found[frozenset()] = fit
        works = [i for i in range(len(groups)) if self._whole_time(frozenset([i])) is not None]
        queue = [frozenset(c) for n in range(1, MOST_TRANSFORMS + 1) for c in itertools.combinations(works, n)]
        freezing: set[int] | None = None
        if adapters:
            freezing = {i for i in works if freezes(groups[i][0], self.model)}
            queue = [names for names in queue if names & freezing]
        queue.sort(key=lambda names: (not self._is_exact(names), self._promise(names), len(names)))
        beaten = []
        for at, names in enumerate(queue):
            if prune and len(self.plans) >= MOST_SIMULATIONS:
                break
            if prune and self._is_beaten(names, limit):
                beaten.append(names)
                continue
            self.expected = len(self.plans) + len(queue) - at
            self._try(names, prune)
        if not self.found:
            return self._last_resort(groups, freezing)
        tries = 0
        for names in beaten:
            known = (self._first(names), self.sizes[-1]) in self.plans
            if known or (len(self.found) == 1 and tries < MOST_MORE):
                tries += not known
                self._try_whole(names)
        return list(self.found.values())

    def _try(self, names: Names, prune: bool) -> None:
        if prune and self._is_second(names) and len(self._alike(names)) > 1:
            self._try_whole(names)  # one more alternative is not worth looking for its micro-batch
            return
        fit = self._mildest([self.groups[i] for i in sorted(names)], only_first=prune and bool(self.found))
        if fit is not None:
            self.found[names] = fit

    def _try_whole(self, names: Names) -> None:
        recipe = self._first(names)
        with contextlib.suppress(*_REFUSALS):
            if need(self._plan(recipe, self.sizes[-1])) <= self.budget:
                self.found[names] = self._made(recipe, self.sizes[-1])

    # -- what is known before a recipe is simulated ------------------------------------------------------------------

    def _first(self, names: Names) -> Recipe:
        return chain(*(self.groups[i][0] for i in sorted(names)))

    def _is_exact(self, names: Names) -> bool:
        return self._first(names).exact

    def _whole_time(self, names: Names, *, simulate: bool = True) -> float | None:
        """Step time on the whole batch as a ratio to stock; None where it does not work or was not simulated."""
        recipe, top = self._first(names), self.sizes[-1]
        if not simulate and (recipe, top) not in self.plans:
            return None
        try:
            return self._seconds(self._plan(recipe, top), self.effective // top) / self.stock_time
        except _REFUSALS:
            return None

    def _promise(self, names: Names) -> float:
        """Expected step time on the whole batch: methods are taken to act independently, as far as not simulated."""
        known = self._whole_time(names, simulate=False)
        if known is not None:
            return known
        expected = [math.prod(self._promise(frozenset([i])) for i in names)] if len(names) > 1 else [1.0]
        for i in names:
            rest = self._whole_time(names - {i}, simulate=False) if len(names) > 2 else None
            if rest is not None:  # two methods may spare the same work, so the slower estimate counts
                expected.append(rest * self._promise(frozenset([i])))
        return max(expected)

    def _alike(self, names: Names) -> list[float]:
        """Times of what fits and is exact, or not, as this recipe is."""
        exact = self._is_exact(names)
        return sorted(fit.time for fit in self.found.values() if fit.recipe.exact == exact)

    def _is_beaten(self, names: Names, limit: int) -> bool:
        """Whether a recipe is not worth showing: slower than a part of itself, or than all that will be shown."""
        promise = self._promise(names)
        if any(other < names and fit.time <= promise for other, fit in self.found.items()):
            return True
        alike, exact = self._alike(names), self._is_exact(names)
        if len(alike) > 1 and promise > FAR_SLOWER * alike[0]:
            return True
        places = limit if exact else max(1, limit - sum(fit.recipe.exact for fit in self.found.values()))
        return len(alike) >= places and promise > alike[places - 1]

    def _is_second(self, names: Names) -> bool:
        """Whether something that fits is surely faster: it is so already, or it is this recipe and more, as fast."""
        promise, alike, top = self._promise(names), self._alike(names), self.sizes[-1]
        if alike and promise > alike[0]:
            return True
        for other, fit in self.found.items():
            if names < other and fit.size < top and self._is_exact(other) == self._is_exact(names):
                whole = self._whole_time(other, simulate=False)
                if whole is not None and whole <= promise * (1 + AS_FAST):
                    return True
        return False

    def _mildest(self, groups: list[list[Transform]], only_first: bool) -> Fit | None:
        """The mildest values of these methods that fit together: all first ones, all second ones, and so on."""
        before = None
        for turn in range(1 if only_first else max(map(len, groups))):
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
        if self._held(recipe) > self.budget:
            return None
        whole, smaller = self._plan(recipe, top), self.sizes[:-1]
        if need(whole) <= self.budget:
            return self._made(recipe, top)
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

    def _held(self, recipe: Recipe) -> int:
        """Weights, gradients and, for optimizers whose state goes by the gradients, the state: there at any batch."""
        draft = self._draft(recipe)
        return draft.static_bytes + round(0.95 * self.state_share * draft.gradient_bytes)

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
