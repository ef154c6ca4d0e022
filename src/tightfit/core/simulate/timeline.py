"""From a trace to levels: live bytes by category at every operator, the peak, phases, saved bytes."""

from __future__ import annotations

import dataclasses

from tightfit.core.simulate.counts import Counts
from tightfit.core.simulate.hidden import Signature
from tightfit.core.simulate.tracker import FORWARD, OPTIMIZER, RECOMPUTE, Trace

CATEGORIES = ("weights", "gradients", "optimizer", "activations", "temporary", "host")
_INDEX = {name: i for i, name in enumerate(CATEGORIES)}
_TEMPORARY = _INDEX["temporary"]


@dataclasses.dataclass
class Levels:
    """Live bytes at the highest moment of each operator.

    Attributes:
        total: per operator, all categories.
        categories: per operator, one list in the order of CATEGORIES; "host" is not part of the total.
        starts: phase number -> (level when it began, by category).
        static: bytes alive before the step.
    """

    total: list[int]
    categories: list[list[int]]
    starts: dict[int, tuple[int, list[int]]]
    static: int


def levels(trace: Trace) -> Levels:
    """Add up a trace."""
    owner = categories(trace)
    now = [0] * len(CATEGORIES)
    for number, size in trace.static.items():
        now[owner[number]] += size
    level = static = sum(now)
    count = len(trace.names)
    total, split = [0] * count, [now] * count
    joined = _joins_in_place(trace)
    starts: dict[int, tuple[int, list[int]]] = {}
    marks = iter([*trace.marks, (-1, -1)])
    phase, begin = next(marks)
    current, high = -1, level
    shape = list(now)
    for position, (operator, number, size) in enumerate(trace.events):
        while position == begin:
            starts.setdefault(phase, (level, list(now)))
            phase, begin = next(marks)
        while current < operator:
            current += 1
            high, shape = level, list(now)
            total[current], split[current] = high, shape
        if (operator, number) in joined:
            size = 0  # the sum took the first operand's place
        elif size:
            now[owner[number]] += size
            level += size
        if level > high and operator >= 0:
            high, shape = level, list(now)
            total[operator], split[operator] = high, shape
    for operator in range(current + 1, count):
        total[operator], split[operator] = level, list(now)
    while begin >= 0:
        starts.setdefault(phase, (level, list(now)))
        phase, begin = next(marks)
    return Levels(total, split, starts, static)


def _joins_in_place(trace: Trace) -> set[tuple[int, int]]:
    """(operator, storage) pairs of sums that the engine forms in the first operand's memory.

    With no mode active the engine adds a second gradient in place when nothing else holds the first; under a
    mode it never does. The first operand was free to be reused if it dies directly after.
    """
    wanted = {(operator, first): made for operator, first, made in trace.joins}
    found: set[tuple[int, int]] = set()
    for operator, number, size in trace.events:
        made = wanted.get((operator, number))
        if made is not None and size < 0:
            found.update(((operator, number), (operator, made)))
    return found


def categories(trace: Trace) -> list[int]:
    """The category of every storage, by number.

    Known ones are named in the trace. Of the rest, what is born in forward and alive at its end is an activation,
    and so is what a recomputation leaves for the backward that follows; everything else is temporary.
    """
    count = 1 + max((number for _, number, _ in trace.events), default=-1)
    count = max(count, 1 + max(trace.static, default=-1))
    out = [_TEMPORARY] * count
    born: list[int | None] = [None] * count
    for operator, number, size in trace.events:
        if size > 0:
            if born[number] is None:
                born[number] = trace.phases[operator]
        elif born[number] in (FORWARD, RECOMPUTE) and trace.phases[operator] != born[number]:
            out[number] = _INDEX["activations"]
    died = {number for _, number, size in trace.events if size < 0}
    for number, phase in enumerate(born):
        if phase == FORWARD and number not in died:
            out[number] = _INDEX["activations"]
        elif phase == OPTIMIZER and number not in died:
            out[number] = _INDEX["optimizer"]
    for number, name in trace.categories.items():
        out[number] = _INDEX[name]
    for _, first, made in trace.joins:  # a sum formed in place is one storage with two numbers
        if out[made] == _INDEX["gradients"]:
            out[first] = out[made]
    return out


@dataclasses.dataclass
class Account:
    """A step added up, simulated block by block or extended from fewer blocks.

    Attributes:
        phases, modules, names: where each point (one dispatched operator) belongs.
        levels: live bytes at each point, kernel-internal memory left out.
        signatures: point -> what is needed to run its operator alone.
        saved: module -> bytes packed for backward.
        counts: work done.
        trace: the allocations behind it, of the deepest stack that was simulated.
        notes: how it came about.
    """

    phases: list[int]
    modules: list[str]
    names: list[str]
    levels: Levels
    signatures: dict[int, Signature]
    saved: dict[str, int]
    counts: Counts
    trace: Trace
    notes: tuple[str, ...] = ()


def account(trace: Trace, counts: Counts) -> Account:
    """Add up one simulated step."""
    saved = saved_by_module(trace)
    return Account(trace.phases, trace.modules, trace.names, levels(trace), trace.signatures, saved, counts, trace)


def with_hidden(found: Levels, extra: dict[int, int]) -> Levels:
    """The same levels with bytes that operators take and give back inside (point -> bytes)."""
    total, split = list(found.total), list(found.categories)
    for point, size in extra.items():
        total[point] += size
        split[point] = list(split[point])
        split[point][_TEMPORARY] += size
    return dataclasses.replace(found, total=total, categories=split)


def peak(found: Levels) -> int:
    """Number of the point with the highest level."""
    return max(range(len(found.total)), key=found.total.__getitem__)


def phase_maxima(found: Levels, phases: list[int]) -> dict[int, int]:
    """Highest level in each phase that the step has, the level at its start included."""
    out = {phase: level for phase, (level, _) in found.starts.items()}
    for phase, level in zip(phases, found.total):
        if level > out.get(phase, -1):
            out[phase] = level
    return {phase: out[phase] for phase in sorted(out) if phase >= FORWARD}


def saved_by_module(trace: Trace) -> dict[str, int]:
    """Bytes of the unique storages packed for backward, by the module whose operator made them."""
    out: dict[str, int] = {}
    born: dict[int, tuple[str, int]] = {}
    for operator, number, size in trace.events:
        if size > 0 and number not in born:
            born[number] = (trace.modules[operator], size)
    for number in trace.saved:
        module, size = born.get(number, ("(batch)", trace.static.get(number, 0)))
        if trace.categories.get(number) not in ("weights", "optimizer", "host"):
            out[module] = out.get(module, 0) + size
    return out
