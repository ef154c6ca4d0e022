"""Step time from the operators of a simulated step and what a machine takes for each.

A simulated step lists its operators with their shapes. Each is priced from tables that `calibrate` measured on this
machine: matrix products by their three dimensions, everything else by its kind and number of elements, plus what
every operator costs before it computes anything, which differs between forward (Python runs the modules), backward
(the engine runs) and optimizer. Outputs so large that the allocator fetches them fresh from the system each time pay
for their pages. Only ratios between two steps are promised: a busy machine is slow for both.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tightfit.core.microbench import FRESH_BYTES
from tightfit.core.prices import NOTHING, Shape, along, base_name, price, product_seconds

if TYPE_CHECKING:
    from tightfit.core.simulate import Simulation

MEDIAN_ERROR, WORST_ERROR = 0.05, 0.15
"""What the ratio of two step times is promised to be off by; benchmarks/scenarios/step_time.py measures it."""

THROUGH_PYTHON = 6
"""A custom operator's dispatch goes through Python: so many times what one of torch's own takes (6 to 10 were seen)."""
_COMPILED = ("aten.", "prims.", "external")
UNSURE = 0.5
"""Share of a step's growth of the heap that is taken to be fresh: whether a heap's freed top goes back to the system
depends on what small block lies above it, which nothing here can know."""


@dataclasses.dataclass(frozen=True)
class Coefficients:
    """What one machine takes for each kind of operator; made by `calibrate`.

    Attributes:
        machine: device, torch version and thread count they hold for.
        kinds: element type -> kind -> [(elements, seconds)], the dispatch of a tiny call taken off.
        products: element type -> "single" or "batched" -> dimensions -> seconds of one product.
        attention: element type -> "forward" or "backward" -> [(length, seconds per head, query, key and channel)].
        dispatch: phase -> seconds per operator.
        fresh: seconds per byte of memory that the system hands out fresh.
        measured: False for the built-in coefficients of another machine.
    """

    machine: dict[str, Any]
    kinds: dict[str, dict[str, list[tuple[int, float]]]]
    products: dict[str, dict[str, dict[tuple[int, int, int], float]]]
    attention: dict[str, dict[str, list[tuple[int, float]]]]
    dispatch: dict[str, float]
    fresh: float
    measured: bool = True

    def note(self) -> str:
        """One line on where the figures come from and how far off they may be."""
        error = f"median {MEDIAN_ERROR:.0%}, at worst {WORST_ERROR:.0%}, checked on the CPU with one thread in fp32"
        if self.measured:
            return f"relative step time is predicted from this machine's calibration; expected error {error}"
        known = self.machine.get("device", "another machine")
        return (
            f"relative step time is predicted with built-in coefficients ({known}); run `tightfit calibrate` for "
            f"this machine's own (then: expected error {error})"
        )

    def headline(self) -> dict[str, float]:
        """A few of the figures in units people know."""
        tables = self.tables("float32")
        product = product_seconds(tables["products"]["single"], 512, 512, 512)
        (size, copying), (drawn, drawing) = tables["kinds"]["copy"][-1], tables["kinds"]["bernoulli_"][-1]
        out = {
            "matrix product 512 x 512 x 512, GFLOP/s": 2e-9 * 512**3 / product,
            "copy out of cache, GB/s read and written": 8e-9 * size / copying,
            "random draws, million/s": 1e-6 * drawn / drawing,
        }
        if self.fresh:
            out["new memory from the system, GB/s"] = 1e-9 / self.fresh
        for phase in ("forward", "backward", "recompute", "optimizer"):
            out[f"before an operator of {phase} computes, us"] = 1e6 * self.dispatch[phase]
        return out

    def tables(self, dtype: str) -> dict[str, Any]:
        """The tables of an element type; those of float32 stand in for one that was not measured."""
        name = dtype.removeprefix("torch.")
        name = name if name in self.kinds else "float32"
        return {"kinds": self.kinds[name], "products": self.products[name], "attention": self.attention[name]}

    def to_json(self) -> dict[str, Any]:
        """The coefficients as JSON values."""
        products = {
            dtype: {how: [[*dims, t] for dims, t in table.items()] for how, table in tables.items()}
            for dtype, tables in self.products.items()
        }
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "measured"}
        return fields | {"products": products}

    @classmethod
    def from_json(cls, data: dict[str, Any], *, measured: bool = True) -> Coefficients:
        """The inverse of `to_json`."""
        products = {
            dtype: {how: {(m, n, k): t for m, n, k, t in rows} for how, rows in tables.items()}
            for dtype, tables in data["products"].items()
        }
        return cls(**{**data, "products": products}, measured=measured)


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Predicted seconds of one step; only ratios between two of them mean anything.

    Attributes:
        phases: forward, backward, recompute, clip, optimizer, zero_grad -> seconds.
        by_kind: kind of operator -> seconds.
        unpriced: operators no table knows, priced as copies of their bytes.
    """

    phases: dict[str, float]
    by_kind: dict[str, float]
    unpriced: frozenset[str] = frozenset()

    @property
    def seconds(self) -> float:
        return sum(self.phases.values())


def relative_step_time(
    step: Simulation, stock: Simulation, coefficients: Coefficients, *, repeat: int = 1, stock_repeat: int = 1
) -> float:
    """Predicted time of one simulated step as a ratio to another.

    Args:
        step, stock: two simulated steps.
        coefficients: from `tightfit.core.calibrate.coefficients()`.
        repeat, stock_repeat: micro-batches that make up each optimizer step (accumulation).

    Example:
        >>> from tightfit.core.calibrate import coefficients
        >>> from tightfit import Checkpointing, plan, skeleton
        >>> from transformers import BertConfig
        >>> model = skeleton(BertConfig(num_hidden_layers=2), task="sequence-classification")
        >>> stock, slow = (plan(model, recipe, batch=(4, 32)).simulation for recipe in (None, Checkpointing()))
        >>> relative_step_time(slow, stock, coefficients(measure=False)) > 1
        True
    """
    reference = accumulated(step_time(stock, coefficients), stock_repeat)
    return accumulated(step_time(step, coefficients), repeat) / reference


def accumulated(time: StepTime, repeat: int) -> float:
    """Seconds of an optimizer step over `repeat` micro-batches like the one that was simulated."""
    once = sum(time.phases.get(name, 0.0) for name in ("clip", "optimizer", "zero_grad"))
    return repeat * (time.seconds - once) + once


def step_time(simulation: Simulation, coefficients: Coefficients) -> StepTime:
    """Price every operator of a simulated step."""
    phases: dict[str, float] = {}
    kinds: dict[str, float] = {}
    unpriced = set()
    for phase, size in fresh_bytes(simulation).items():
        phases[phase] = size * coefficients.fresh
    kinds["fresh"] = sum(phases.values())
    tables = {dtype: coefficients.tables(dtype) for dtype in {call[2] for call in simulation.calls}}
    for (phase, operator, dtype, inputs, outputs), number in _warm(simulation):
        kind, seconds = price(operator, inputs, outputs, tables[dtype])
        if kind == "unknown":
            unpriced.add(operator)
        dispatch = coefficients.dispatch.get(phase, coefficients.dispatch["forward"])
        seconds += dispatch if operator.startswith(_COMPILED) else THROUGH_PYTHON * dispatch
        phases[phase] = phases.get(phase, 0.0) + number * seconds
        kinds[kind] = kinds.get(kind, 0.0) + number * seconds
    for dtype, elements in untouched(simulation).items():
        curves = coefficients.tables(dtype)["kinds"]
        seconds = max(0.0, along(curves["sqrt_zero"], elements) - along(curves["sqrt"], elements))
        phases["optimizer"] += seconds
        kinds["sqrt of zeros"] = kinds.get("sqrt of zeros", 0.0) + seconds
    return StepTime(phases, kinds, frozenset(unpriced))


def _warm(simulation: Simulation) -> Iterator[tuple[tuple, int]]:
    """The calls of a step that is not the first: an optimizer's state was made in that one."""
    for call, number in simulation.calls.items():
        if call[0] != "optimizer" or base_name(call[1]) not in ("zeros_like", "zeros", "full"):
            yield call, number


def untouched(simulation: Simulation) -> dict[str, float]:
    """Element type -> elements of embedding tables without a gradient of their own, of which the optimizer takes roots.

    An Adam optimizer takes the root of every second moment, and that of an exact zero can cost many times that of
    another number. Rows of an embedding that no batch has looked up have such moments; those of a table that is also
    a head have not.
    """
    looked_up: dict[tuple[str, Shape], list[float]] = {}
    added: Counter[Shape] = Counter()
    roots: Counter[Shape] = Counter()
    for (phase, operator, dtype, inputs, outputs), number in simulation.calls.items():
        name = base_name(operator)
        if name == "embedding_dense_backward":
            rows, indices = outputs[0][0], math.prod(inputs[1])
            share = math.exp(-indices / rows)  # of the rows, if the indices are drawn at random
            looked_up.setdefault((dtype, outputs[0]), []).extend([share * math.prod(outputs[0])] * number)
        elif phase in ("backward", "recompute") and name in ("add", "add_") and inputs[0] == inputs[-1]:
            added[inputs[0]] += number
        elif phase == "optimizer" and name == "sqrt":
            roots[inputs[0]] += number
        elif phase == "optimizer" and name == "_foreach_sqrt":
            roots.update(inputs)
    turns = micro_batches(simulation)
    out: dict[str, float] = {}
    for (dtype, shape), elements in looked_up.items():
        joined = (added[shape] - (turns - 1) * roots[shape]) / turns
        tables = min(roots[shape], len(elements) / turns - max(0, joined))
        if tables > 0:
            out[dtype] = out.get(dtype, 0.0) + tables * statistics.fmean(elements)
    return out


def micro_batches(simulation: Simulation) -> int:
    """How many forward passes with a backward pass each the step has."""
    pairs = itertools.pairwise(simulation.timeline.phases)
    return 1 + sum(later == "forward" and before in ("backward", "recompute") for before, later in pairs)


def fresh_bytes(simulation: Simulation) -> dict[str, float]:
    """Bytes per phase that a step's allocations fault in anew, the way glibc's allocator keeps and returns memory.

    Blocks above `FRESH_BYTES` always come from the system. The rest comes from a heap that keeps what was freed at
    its top until that is twice the largest block freed so far, and then returns it, unless something lies above it.
    """
    out: dict[str, float] = {}
    largest = 0
    for (phase, operator, dtype, _, outputs), number in _warm(simulation):
        if base_name(operator).endswith("_") or base_name(operator) in NOTHING:
            continue
        width = 2 if "16" in dtype else 4
        for shape in outputs:
            size = width * math.prod(shape)
            if size > FRESH_BYTES:
                out[phase] = out.get(phase, 0.0) + number * size
                largest = FRESH_BYTES
            largest = max(largest, min(size, FRESH_BYTES))
    levels = simulation.timeline.levels
    high = before = simulation.static_bytes
    for turn in (0, 1):  # a step begins with the heap as the step before left it
        for phase, level in zip(simulation.timeline.phases, levels):
            change, before = level - before, level
            if abs(change) > FRESH_BYTES:
                high += change
            if level > high:
                if turn:
                    out[phase] = out.get(phase, 0.0) + UNSURE * (level - high)
                high = level
            elif high - level > 1.9 * largest:
                high = level
    return out
