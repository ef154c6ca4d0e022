"""Long stacks of like blocks: simulate three short ones and extend every point of the step.

A line through the peaks of short stacks is wrong as soon as the peak changes its phase. So points are extended, not
peaks: a point is one dispatched operator with its highest live bytes, and its key says where it is (phase, block
counted from the start in the first half of the stack and from the end in the second, path in the block, operator,
ordinal). Each point moves on a straight line with depth, and the maximum over the extended points is the peak.
The third depth is predicted from the first two and must agree to the byte, else the whole stack is simulated; a search
that checks its answers afterwards may do without the third.
"""

from __future__ import annotations

import contextlib
import dataclasses
import types
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tightfit.core import hfmodel
from tightfit.core.errors import SimulationError
from tightfit.core.simulate.counts import Counts
from tightfit.core.simulate.step import StepOptions, trace_step
from tightfit.core.simulate.timeline import CATEGORIES, Account, Levels, account, phase_maxima
from tightfit.core.simulate.tracker import OPTIMIZER
from tightfit.core.tight import _LAYERS

WORTH = 0.65
"""The short stacks together must have at most this share of the blocks."""
Key = tuple[Any, ...]
_TEMPORARY = CATEGORIES.index("temporary")


@dataclasses.dataclass(frozen=True)
class Stacks:
    """The stacks of a model, all of one length, and their period."""

    names: list[str]
    length: int
    period: int

    def depths(self) -> tuple[int, int, int]:
        """Three depths to simulate: each end has a whole period, and the rest is a multiple of it."""
        first = 2 * self.period + (self.length % self.period)
        return first, first + self.period, first + 2 * self.period


def extended(model: nn.Module, batch: Mapping[str, Any], options: StepOptions, how: str | bool) -> Account | None:
    """The whole step from short stacks, or None where the stack is short or its blocks are not alike.

    Args:
        how: as `simulate(extrapolate=...)`.
    """
    stacks = like_stacks(model)
    if stacks is None:
        return None
    depths = stacks.depths()
    used = depths[:2] if how == "unchecked" else depths
    if depths[-1] >= stacks.length or (how is not True and sum(used) > WORTH * stacks.length):
        return None
    # whatever a shortened model cannot do, the whole one may
    with contextlib.suppress(SimulationError):
        short = [_short(model, batch, options, stacks, depth) for depth in used]
        points = [_keys(found, stacks, depth) for found, depth in zip(short, depths)]
        if how == "unchecked":
            return _extend(short[0], short[1], points[0], points[1], used, stacks.length, stacks)
        check = _extend(short[0], short[1], points[0], points[1], depths[:2], depths[2], stacks)
        if check is None or not _same(check, short[2]):
            return None
        return _extend(short[1], short[2], points[1], points[2], depths[1:], stacks.length, stacks)
    return None


def like_stacks(model: nn.Module) -> Stacks | None:
    """The model's stacks if they have one length and their blocks repeat."""
    found = hfmodel.stacks(model)
    if not found or len({len(stack) for stack in found}) != 1:
        return None
    length = len(found[0])
    try:
        looks = [tuple(_look(model.get_submodule(stack[i])) for stack in found) for i in range(length)]
    except _Opaque:
        return None
    for period in range(1, length // 4 + 1):
        if all(looks[i] == looks[i + period] for i in range(1, length - period - 1)):
            return Stacks([stack[0].rsplit(".", 1)[0] for stack in found], length, period)
    return None


def _look(block: nn.Module) -> Key:
    """What makes two blocks alike: classes, plain settings (those of our edits too), and the form of their tensors.

    Raises:
        _Opaque: an edit keeps something on the block that may single out its place in the stack.
    """
    parts: list[Any] = []
    for name, module in block.named_modules():
        own = vars(module)
        settings = {key: value for key, value in own.items() if isinstance(value, _PLAIN) and not _is_place(key)}
        parts.append((name, type(module), tuple(sorted(settings.items(), key=str))))
        for mixin, state in own.get(_LAYERS, {}).items():
            parts.append((name, mixin, _state(state)))
    for name, tensor in (*block.named_parameters(), *block.named_buffers()):
        parts.append((name, tuple(tensor.shape), tensor.dtype, tensor.requires_grad))
    return tuple(parts)


class _Opaque(Exception):
    """A block that cannot be compared with others."""


_PLAIN = (bool, int, float, str)


def _state(value: Any, depth: int = 6) -> Any:
    """A setting in a form that can be compared.

    An object of ours may say with `blocks_alike = False` that it treats blocks by their number.
    """
    if value is None or isinstance(value, (*_PLAIN, type, torch.dtype)):
        return value
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype
    if type(value).__module__ == "torch._ops":
        return str(value)
    if depth and isinstance(value, types.FunctionType):
        cells = (cell.cell_contents for cell in value.__closure__ or ())
        return value.__module__, value.__qualname__, tuple(_state(cell, depth - 1) for cell in cells)
    if isinstance(value, (tuple, list)):
        return tuple(_state(item, depth) for item in value)
    if isinstance(value, dict):
        return tuple((str(key), _state(item, depth)) for key, item in value.items() if not _is_place(key))
    ours = type(value).__module__.startswith("tightfit.") and not isinstance(value, nn.Module)
    if isinstance(value, frozenset) and not value:
        return type(value)
    if depth and (ours or dataclasses.is_dataclass(value)) and getattr(value, "blocks_alike", True):
        return type(value), _state(vars(value), depth - 1)
    raise _Opaque


def _is_place(key: Any) -> bool:
    return any(word in str(key) for word in ("idx", "index", "layer_id", "number", "seed"))


def _short(model, batch, options: StepOptions, stacks: Stacks, depth: int) -> Account:
    tail = depth // 2
    lists = {}
    for name in stacks.names:
        blocks = model.get_submodule(name)
        kept = [*range(depth - tail), *range(stacks.length - tail, stacks.length)]
        lists[id(blocks)] = [blocks[i] for i in kept]  # type: ignore[index]
    return account(*trace_step(model, batch, options, lists))


# -- keys --------------------------------------------------------------------------------------------------------


def _keys(found: Account, stacks: Stacks, depth: int) -> dict[Key, int]:
    """Key -> number of the point."""
    groups: dict[Key, list[int]] = {}
    for number, (phase, module, name) in enumerate(zip(found.phases, found.modules, found.names)):
        stack, block, path = _place(module, stacks)
        if block is not None:
            block = block if block < depth - depth // 2 else block - depth
        groups.setdefault((phase, name, stack, block, path), []).append(number)
    keys: dict[Key, int] = {}
    for group, numbers in groups.items():
        if group[0] == OPTIMIZER:
            # A loop over parameters meets other parameters at other depths, so its points go by what they take.
            # An operator over all parameters at once runs equally often at any depth and goes by its turn.
            size = found.levels.categories
            before = found.levels.starts[OPTIMIZER][1][_TEMPORARY]
            keys |= {(*group, "of", len(numbers), i): number for i, number in enumerate(numbers)}
            keys |= {(*group, "takes", size[number][_TEMPORARY] - before): number for number in numbers}
            continue
        half = (len(numbers) + 1) // 2
        for i, number in enumerate(numbers):
            # loops over parameters grow with the depth: count from the nearer end
            keys[(*group, i if i < half else i - len(numbers))] = number
    return keys


def _place(module: str, stacks: Stacks) -> tuple[int, int | None, str]:
    for number, name in enumerate(stacks.names):
        if module.startswith(name + "."):
            block, _, path = module[len(name) + 1 :].partition(".")
            if block.isdigit():
                return number, int(block), path
    return -1, None, module


def _renamed(module: str, stacks: Stacks, depth: int, target: int) -> str:
    """The module's name in the stack of `target` blocks."""
    stack, block, path = _place(module, stacks)
    if block is None or block < depth - depth // 2:
        return module
    return ".".join(part for part in (stacks.names[stack], str(block + target - depth), path) if part)


# -- lines -------------------------------------------------------------------------------------------------------


def _extend(
    near: Account,
    far: Account,
    near_keys: dict[Key, int],
    far_keys: dict[Key, int],
    depths: tuple[int, ...],
    target: int,
    stacks: Stacks,
) -> Account | None:
    """The account at depth `target` from those at two smaller depths."""
    matched = {far_keys[key]: near_keys[key] for key in far_keys.keys() & near_keys.keys()}
    pairs = sorted(matched.items())
    if not pairs:
        return None
    low, high = depths

    def line(a: int, b: int) -> int:
        return b + (b - a) * (target - high) // (high - low)

    def lines(a: list[int], b: list[int]) -> list[int]:
        return [line(x, y) for x, y in zip(a, b)]

    one, two = near.levels, far.levels
    levels = Levels(
        total=[line(one.total[j], two.total[i]) for i, j in pairs],
        categories=[lines(one.categories[j], two.categories[i]) for i, j in pairs],
        starts={
            phase: (line(one.starts[phase][0], level), lines(one.starts[phase][1], split))
            for phase, (level, split) in two.starts.items()
            if phase in one.starts
        },
        static=line(one.static, two.static),
    )
    numbers = [i for i, _ in pairs]
    return Account(
        phases=[far.phases[i] for i in numbers],
        modules=[_renamed(far.modules[i], stacks, high, target) for i in numbers],
        names=[far.names[i] for i in numbers],
        levels=levels,
        signatures={k: far.signatures[i] for k, i in enumerate(numbers) if i in far.signatures},
        saved=_saved(near, far, stacks, depths, target),
        counts=_counts(near.counts, far.counts, line),
        trace=far.trace,
        notes=(f"extended from {low} and {high} of {target} like blocks per stack",),
    )


def _counts(near: Counts, far: Counts, line) -> Counts:
    out = {}
    for field in dataclasses.fields(Counts):
        one, two = getattr(near, field.name), getattr(far, field.name)
        out[field.name] = {key: line(one[key], value) for key, value in two.items() if key in one}
    for key, value in _longer_calls(near.calls, far.calls, line):
        out["calls"][key] = out["calls"].get(key, 0) + value
    return Counts(**out)


def _longer_calls(near: dict[Key, int], far: dict[Key, int], line):
    """Operators over all parameters at once: their lists of tensors grow by the same shapes with every block."""
    rest = [key for key in near if key not in far]
    for key in far:
        if key in near:
            continue
        twin = next((k for k in rest if k[:3] == key[:3]), None)
        if twin is None:
            continue
        rest.remove(twin)
        grown = []
        for small, large in zip(twin[3:], key[3:]):
            before, after = Counter(small), Counter(large)
            grown.append(tuple(Counter({shape: line(before[shape], n) for shape, n in after.items()}).elements()))
        yield (*key[:3], *grown), far[key]


def _saved(near: Account, far: Account, stacks: Stacks, depths, target: int) -> dict[str, int]:
    """Saved bytes by module: blocks in the middle are like those of the last period of the first half."""
    low, high = depths
    head = high - high // 2
    out: dict[str, int] = {}
    for module, size in far.saved.items():
        stack, block, path = _place(module, stacks)
        if block is None:
            out[module] = size + (size - near.saved.get(module, 0)) * (target - high) // (high - low)
            continue
        out[_renamed(module, stacks, high, target)] = size
        if head - stacks.period <= block < head:
            for copy in range(block + stacks.period, target - high // 2, stacks.period):
                out[".".join(p for p in (stacks.names[stack], str(copy), path) if p)] = size
    return out


def _same(predicted: Account, simulated: Account) -> bool:
    """Whether a prediction agrees with the simulation to the byte, in every phase."""
    one, two = predicted.levels, simulated.levels
    return (
        phase_maxima(one, predicted.phases) == phase_maxima(two, simulated.phases)
        and one.static == two.static
        and one.starts == two.starts
        and sum(predicted.saved.values()) == sum(simulated.saved.values())
    )
