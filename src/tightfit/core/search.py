"""Finding a recipe that fits a memory budget.

Every method offers values worth trying (`Transform.candidates`). They are simulated alone on the whole batch; from that
the time and the memory of their combinations are guessed. Then a best-first search: the most promising combination is
simulated, goes back with what it really takes, and is an answer once it is still the most promising one.
"""

from __future__ import annotations

import bisect
import contextlib
import heapq
import itertools
import math
from collections.abc import Callable
from typing import Any

from torch import nn

from tightfit.core.batch import Batch, length_of, rows_of
from tightfit.core.errors import BudgetError, SimulationError, StateError, UnsupportedModelError
from tightfit.core.fitting import Fit, Fitting, need
from tightfit.core.plan import mib
from tightfit.core.recipe import Recipe, chain
from tightfit.core.timing import MEDIAN_ERROR
from tightfit.core.transform import Transform

OPTIMISM = 0.5
"""Methods together may take this share of the activations that one would guess from each of them alone."""
INDIFFERENT = MEDIAN_ERROR
"""Recipes predicted to be no slower than the fastest by more than this are alike: the simplest of them goes first."""
MOST_TRANSFORMS = 3
MOST_SIMULATIONS = 60
MOST_MORE = 3
"""So many more steps are simulated for alternatives once the best recipe is known."""
_REFUSALS = (SimulationError, UnsupportedModelError, StateError, ValueError)

Progress = Callable[[int, int], None]
Names = frozenset[int]
"""Numbers of the methods in a recipe."""


def check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"recommend({name}=...): got {value!r}, accepted is an int >= 1")


def freezes(transform: Transform, model: nn.Module) -> bool:
    """Whether a method freezes weights of the model's own."""
    return next(iter(transform.freezes(model)), None) is not None


class Search:
    """Recipes of given methods that fit a budget.

    Args:
        model, batch: as for `plan`.
        budget: bytes.
        effective: rows per optimizer step; None for those of the batch.
        options: the options of `plan`, the optimizer among them.
        progress: called with the number of steps simulated and the number still expected.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Batch,
        budget: int,
        effective: int | None,
        options: dict[str, Any],
        progress: Progress | None = None,
    ):
        if effective is not None:
            check_count("effective_batch", effective)
        self.model, self.batch, self.progress = model, batch, progress
        self.expected = 1
        rows = rows_of(batch) if effective is None else effective
        self.fitting = Fitting(model, batch, budget, rows, options, self._told)

    def run(
        self, groups: list[list[Transform]], limit: int, *, adapters: bool = False, prune: bool = True
    ) -> list[Fit]:
        """What fits, with the best of the exact and of the other recipes among it; all of it without pruning.

        Args:
            groups: per method its values, the mildest first.
            limit: choices wanted.
            adapters: only recipes that freeze the model's own weights.
            prune: leave out what cannot be the best.

        Raises:
            SimulationError: the stock step cannot be simulated.
            ValueError: only adapters are asked for, and no method freezes weights.
        """
        self.groups, self.expected = groups, 2 + 2 * len(groups)
        self.fitting.start()
        self.found: dict[Names, Fit] = {}
        self.strength: dict[Names, int] = {}
        self.per_turn: float | None = None
        works = [i for i in range(len(groups)) if self._single(i)]
        freezing = {i for i in works if freezes(groups[i][0], self.model)} if adapters else None
        if freezing is not None and not freezing:
            raise ValueError(
                f"recommend(tune='adapters'): none of the methods freezes weights of this {type(self.model).__name__} "
                f"and works on it; allow one that does, such as Lora, or tune='any'"
            )
        every = [frozenset(c) for n in range(MOST_TRANSFORMS + 1) for c in itertools.combinations(works, n)]
        wanted = [names for names in every if freezing is None or names & freezing]
        if not prune:
            for names in wanted:
                while self._refine(names):
                    pass
            return list(self.found.values())
        for exact in (True, False):
            self._best_first([names for names in wanted if self._recipe(names, 0).exact == exact], limit)
        for names in wanted:
            if names not in self.found and (fit := self.fitting.settled(self._recipe(names))) is not None:
                self.found[names] = fit
        return list(self.found.values()) or self._last_resort(groups, freezing)

    def _best_first(self, names: list[Names], limit: int) -> None:
        """Settle the most promising recipes, one step at a time, until the best is known and some alternatives."""
        queue: list[tuple[float, int, list[int], Names]] = []

        def put(item: Names) -> None:
            # of two that promise the same, the simpler one first
            heapq.heappush(queue, (self._promise(item), len(item), sorted(item), item))

        for item in names:
            put(item)
        best, more = False, MOST_MORE
        places = limit - sum(fit.recipe.exact for fit in self.found.values())
        while queue and places > 0 and len(self.fitting.plans) < MOST_SIMULATIONS:
            promise, _, _, item = heapq.heappop(queue)
            if item in self.found:
                places -= 1
                best = True
                continue
            if any(other < item and fit.time <= promise * (1 + INDIFFERENT) for other, fit in self.found.items()):
                continue  # a part of it fits and is about as fast
            if best and more == 0:
                continue
            more -= best
            self.expected = len(self.fitting.plans) + min(len(queue), 4)
            if self._refine(item) or item in self.found:
                put(item)

    def _refine(self, names: Names) -> bool:
        """Simulate one more step of a recipe; False where it has become known whether and where it fits."""
        if names in self.found:
            return False
        recipe = self._recipe(names)
        try:
            self.fitting.draft(recipe)
            size = self._next_size(names)
            if size is not None:
                self.fitting.plan(recipe, size)
                self._learn(names, recipe, size)
                return True
            fit = self.fitting.settled(recipe)
            if fit is not None:
                self.found[names] = fit
                return False
            return self._stronger(names, recipe)
        except _REFUSALS:
            return False  # these methods do not work on this model together; others may

    def _stronger(self, names: Names, before: Recipe) -> bool:
        """Go on to the next stronger values that may fit; False where there are none."""
        tried = self.fitting.tried(before)
        while self.strength.get(names, 0) + 1 < max((len(self.groups[i]) for i in names), default=0):
            strength = self.strength[names] = self.strength.get(names, 0) + 1
            if not tried and not any(self._lowers_floor(i, strength) for i in names):
                continue  # it was too large for what stays the same
            if self.fitting.may_fit_after(self._recipe(names), before):
                return True
        return False

    def _lowers_floor(self, i: int, strength: int) -> bool:
        mild, strong = (self._recipe(frozenset([i]), s) for s in (0, strength))
        return self.fitting.floor(strong) < self.fitting.floor(mild)

    # -- what is known before a recipe is simulated ------------------------------------------------------------------

    def _recipe(self, names: Names, strength: int | None = None) -> Recipe:
        """Its methods with all their first values, or all second ones, and so on; -1 for the strongest."""
        if strength is None:
            strength = self.strength.get(names, 0)
        values = (self.groups[i] for i in sorted(names))
        return chain(*(group[-1 if strength < 0 else min(strength, len(group) - 1)] for group in values))

    def _single(self, i: int) -> bool:
        """Simulate a method alone on the whole batch; False where it does not work on this model."""
        try:
            self.fitting.plan(self._recipe(frozenset([i]), 0), self.fitting.sizes[-1])
        except _REFUSALS:
            return False
        return True

    def _whole(self, names: Names) -> Fit:
        """A single method, or none, on the whole batch."""
        return self.fitting.made(self._recipe(names, 0), self.fitting.sizes[-1])

    def _promise(self, names: Names) -> float:
        """Expected step time at the rows that would be simulated next, rather too short than too long.

        On the whole batch methods are taken to act independently; every further micro-batch costs the same.
        """
        if names in self.found:
            return self.found[names].time
        recipe = self._recipe(names)
        whole = self._whole_time(names)
        tried = self.fitting.tried(recipe)
        turns = self._turns(self._next_size(names) or min(tried, default=self.fitting.sizes[0]))
        if not tried:
            return whole * (1 + (turns - 1) * (self.per_turn or 0.0))
        near = min(tried, key=lambda n: abs(self._turns(n) - turns))
        cost = max(0.0, self.fitting.made(recipe, near).time - whole) / max(1, self._turns(near) - 1)
        return self.fitting.made(recipe, near).time + (turns - self._turns(near)) * cost

    def _whole_time(self, names: Names) -> float:
        return math.prod(self._whole(frozenset([i])).time for i in names)

    def _turns(self, size: int) -> int:
        return self.fitting.effective // size

    def _learn(self, names: Names, recipe: Recipe, size: int) -> None:
        """Keep the least that a further micro-batch was seen to cost, as a share of the step on the whole batch."""
        if size < self.fitting.sizes[-1]:
            ratio = self.fitting.made(recipe, size).time / self._whole_time(names)
            cost = max(0.0, ratio - 1) / (self._turns(size) - 1)
            self.per_turn = cost if self.per_turn is None else min(self.per_turn, cost)

    def _next_size(self, names: Names) -> int | None:
        """The rows at which a recipe is simulated next, None for none; at first the most that are guessed to fit."""
        recipe, sizes, budget = self._recipe(names), self.fitting.sizes, self.fitting.budget
        if self.fitting.tried(recipe):
            return self.fitting.next_size(recipe)
        known = recipe in self.fitting.drafts
        floor = self.fitting.floor(recipe) if known else self._guessed_floor(names)
        above = self._guessed_above(names)
        if known and (floor > budget or floor + OPTIMISM * above * sizes[0] / sizes[-1] > budget):
            return None
        return max((n for n in sizes if floor + above * n / sizes[-1] <= budget), default=sizes[0])

    def _guessed_floor(self, names: Names) -> int:
        """What is there at any batch, if every method spares what it does alone."""
        stock = self.fitting.floor(Recipe())
        singles = (self._recipe(frozenset([i]), 0) for i in names)
        return max(0, stock - sum(stock - self.fitting.floor(single) for single in singles))

    def _guessed_above(self, names: Names) -> float:
        """Bytes above the floor on the whole batch, if every method takes the share of them that it leaves alone."""
        found = [self._whole(frozenset([i])) for i in names]
        stock = self._whole(frozenset())
        most, *rest = (max(1, need(fit.plan) - self.fitting.floor(fit.recipe)) for fit in (stock, *found))
        return most * math.prod(above / most for above in rest)

    def _told(self, done: int) -> None:
        if self.progress is not None:
            self.progress(done, max(self.expected, done))

    # -- when nothing fits ------------------------------------------------------------------------------------------

    def _last_resort(self, groups: list[list[Transform]], freezing: set[int] | None) -> list[Fit]:
        """The most frugal recipes at the smallest micro-batch; their plans are what `failure` names."""
        smallest = self.fitting.sizes[0]
        for recipe in self._frugal(groups, freezing):
            try:
                if need(self.fitting.plan(recipe, smallest)) <= self.fitting.budget:
                    return [self.fitting.made(recipe, smallest)]
            except _REFUSALS:
                continue
        return []

    def failure(self, budget: str | int) -> BudgetError:
        """Why nothing fits, and what would."""
        (recipe, size), found = min(self.fitting.plans.items(), key=lambda item: need(item[1]))
        message = (
            f"budget: no recipe fits {_shown(budget)}; the smallest peak found is {mib(need(found))}, of {recipe} with "
            f"{size} row{'s' if size > 1 else ''} at a time"
        )
        shorter = self._shorter(recipe)
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
                    draft = self.fitting.draft(recipe)
                except _REFUSALS:
                    continue
                if not draft.conflicts and draft.trainable:
                    drafts.append(draft)
        drafts.sort(key=lambda draft: (draft.static_bytes, -len(draft.recipe)))
        return [draft.recipe for draft in drafts[:3]]

    def _shorter(self, recipe: Recipe) -> int | None:
        """The largest half, quarter, ... of the batch's length at which the recipe fits."""
        length, halves = length_of(self.batch) or 0, []
        while length > 16:
            length //= 2
            halves.append(length)
        options = {**self.fitting.options, "accumulate": min(2, self.fitting.effective)}

        def fits(length: int) -> bool:
            found = self.fitting.draft(recipe).plan((1, length), self.fitting.optimizer, options)
            return need(found) <= self.fitting.budget

        with contextlib.suppress(*_REFUSALS):
            at = bisect.bisect_left(halves, True, key=fits)
            return halves[at] if at < len(halves) else None
        return None


def _shown(budget: str | int) -> str:
    return mib(budget) if isinstance(budget, int) else budget
