"""The largest micro-batch at which a recipe fits a budget, by few simulated steps.

A step is simulated at one number of rows; what it takes at others is estimated from that, and only where the estimate
says that a recipe fits is it simulated there too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from tightfit.core.batch import Batch, cut, rows_of
from tightfit.core.calibrate import coefficients
from tightfit.core.errors import ConflictError
from tightfit.core.plan import Draft, Plan
from tightfit.core.recipe import Recipe
from tightfit.core.timing import accumulated, step_time

MARGIN = {"cpu": 0.003, "cuda": 0.06}
"""A prediction may be this much under what is measured; a recipe fits only with that much to spare."""
ROUGH = 1.1
"""An estimate of a smaller batch's step may be this much above the truth."""


def need(found: Plan) -> int:
    """Bytes a plan may take at worst: the prediction, what could not be seen, and the margin of its device."""
    slack = found.simulation.slack_bytes if found.simulation is not None else 0
    device = found.source.options.get("device", "cpu") if found.source is not None else "cpu"
    return round((found.peak_bytes + slack) * (1 + (0.0 if found.measured else MARGIN[device])))


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


@dataclasses.dataclass(frozen=True, eq=False)
class Fit:
    """A recipe that fits, with the micro-batch at which it does."""

    recipe: Recipe
    plan: Plan
    size: int
    turns: int
    time: float


class Fitting:
    """Simulated steps of recipes on one model, batch and budget; every step at most once.

    Attributes:
        sizes: the micro-batches allowed, as rows, smallest first; the last is the whole batch where it is held at once.
        plans: (recipe, rows) -> what was simulated.
        stock_time: seconds of the stock step on the whole batch.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Batch,
        budget: int,
        effective: int,
        options: dict[str, Any],
        told: Callable[[int], None],
    ):
        self.model, self.batch, self.budget, self.effective = model, batch, budget, effective
        self.options = dict(options)
        self.optimizer = self.options.pop("optimizer")
        top = min(rows_of(batch), effective) if isinstance(batch, Mapping) else effective
        self.sizes = [n for n in range(1, top + 1) if effective % n == 0]
        self.plans: dict[tuple[Recipe, int], Plan] = {}
        self.drafts: dict[Recipe, Draft] = {}
        self._fits: dict[tuple[Recipe, int], Fit] = {}
        self.coefficients = coefficients()
        self.told = told
        self.stock_time = 1.0
        self._state = self._scratch = 0

    def start(self) -> None:
        """Simulate the stock step on the whole batch, which times are relative to. Raises: SimulationError."""
        stock = self.plan(Recipe(), self.sizes[-1])
        self.stock_time = self._seconds(stock, self.effective // self.sizes[-1])
        self._state = stock.by_category["optimizer"]
        peak = stock.simulation.phases.get("optimizer", 0)
        self._scratch = max(0, peak - self._state - self.draft(Recipe()).static_bytes)

    def draft(self, recipe: Recipe) -> Draft:
        if recipe not in self.drafts:
            self.drafts[recipe] = Draft(self.model, recipe)
        return self.drafts[recipe]

    def plan(self, recipe: Recipe, size: int) -> Plan:
        """The recipe's step on `size` rows; a third micro-batch takes what the second one took."""
        key = (recipe, size)
        if key not in self.plans:
            draft = self.draft(recipe)
            if draft.conflicts:
                raise ConflictError("; ".join(str(conflict) for conflict in draft.conflicts))
            self.plans[key] = self._simulated(draft, size, {"extrapolate": "unchecked", **self.options})
            self.told(len(self.plans))
        return self.plans[key]

    def checked(self, fit: Fit) -> Fit | None:
        """The fit with a plan whose extrapolation was checked, or None where it does not fit after all.

        Then the checked plan takes the place of the other one.
        """
        if not any("extended" in note for note in fit.plan.notes):
            return fit
        found = self._simulated(self.draft(fit.recipe), fit.size, self.options)
        if need(found) <= self.budget:
            return dataclasses.replace(fit, plan=found)
        key = (fit.recipe, fit.size)
        self.plans[key] = found
        self._fits.pop(key, None)
        return None

    def _simulated(self, draft: Draft, size: int, options: dict[str, Any]) -> Plan:
        options = {**options, "accumulate": min(2, self.effective // size)}
        return draft.plan(cut(self.batch, size), self.optimizer, options)

    def tried(self, recipe: Recipe) -> list[int]:
        """The numbers of rows at which the recipe was simulated, smallest first."""
        return [n for n in self.sizes if (recipe, n) in self.plans]

    def floor(self, recipe: Recipe) -> int:
        """What the optimizer's step takes at any batch, rather too little than too much.

        Weights, gradients, a state that goes by the gradients, and its temporary tensors, which go by all gradients or
        by the largest.
        """
        draft, stock = self.draft(recipe), self.draft(Recipe())
        part = draft.gradient_bytes / stock.gradient_bytes
        scratch = min(part, draft.largest_bytes / stock.largest_bytes) * self._scratch
        return draft.static_bytes + round(0.95 * (part * self._state + scratch))

    def next_size(self, recipe: Recipe) -> int | None:
        """The rows at which to simulate a recipe next, or None where its largest fitting micro-batch is known.

        It must have been simulated at some number of rows.
        """
        known = {n: need(self.plans[recipe, n]) for n in self.tried(recipe)}
        fits = max((n for n, size in known.items() if size <= self.budget), default=0)
        fails = min((n for n, size in known.items() if size > self.budget), default=self.sizes[-1] + 1)
        between = [n for n in self.sizes if fits < n < fails]
        guesses = {n: self.guess(recipe, n) for n in between}
        likely = [n for n in between if guesses[n] <= self.budget]
        if likely:
            return likely[-1]
        if not fits and between and guesses[between[0]] <= ROUGH * self.budget:
            return between[0]
        return None

    def guess(self, recipe: Recipe, size: int) -> float:
        """About what a recipe takes on `size` rows, from the nearest step of it that was simulated."""
        near = min(self.tried(recipe), key=lambda n: max(n, size) / min(n, size))
        found = self.plans[recipe, near]
        guess = estimate(found.simulation, size / near)
        if near == self.effective:  # it did not accumulate, so its own figure says nothing of one that does
            return guess
        return guess * need(found) / estimate(found.simulation, 1)

    def settled(self, recipe: Recipe) -> Fit | None:
        """The recipe at the largest micro-batch that was simulated and fits."""
        fits = [n for n in self.tried(recipe) if need(self.plans[recipe, n]) <= self.budget]
        return self.made(recipe, fits[-1]) if fits else None

    def made(self, recipe: Recipe, size: int) -> Fit:
        """A recipe at a micro-batch, with the time of its optimizer step over the stock one's at the whole batch."""
        key = (recipe, size)
        if key not in self._fits:
            found, turns = self.plan(recipe, size), self.effective // size
            self._fits[key] = Fit(recipe, found, size, turns, self._seconds(found, turns) / self.stock_time)
        return self._fits[key]

    def may_fit_after(self, recipe: Recipe, before: Recipe) -> bool:
        """Whether a stronger value of a recipe that does not fit takes enough away: weights, gradients, two moments."""
        tried = self.tried(before)
        if not tried:
            return self.floor(recipe) <= self.budget
        least = min(need(self.plans[before, n]) for n in tried)
        least = min(least, round(self.guess(before, self.sizes[0]) / ROUGH))
        gain = self.draft(before).static_bytes - self.draft(recipe).static_bytes
        return least - 3 * gain <= self.budget

    def _seconds(self, found: Plan, turns: int) -> float:
        """Predicted seconds of an optimizer step over `turns` micro-batches, of which up to two were simulated."""
        repeat: Any = turns / min(2, turns)
        return accumulated(step_time(found.simulation, self.coefficients), repeat)
