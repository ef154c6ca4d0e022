"""Memory that a CPU kernel takes and gives back inside one operator, where the dispatcher cannot see it.

oneDNN reorders operands, mixed types are copied to the common one, attention keeps buffers per thread. None of that
follows from shapes alone; it depends on version and processor. So each distinct operator that may do so is run once
for real, alone, on zeros, under the profiler, and the difference between its maximum and its net change is put into
the list of allocations. Operators that could not reach the peak are not run; those too large to run are named.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import torch

from tightfit.core.memory import allocation_profile
from tightfit.core.simulate.counts import facts

aten = torch.ops.aten

SECONDS = 1.5
"""Time for running operators alone; what is left then is named in the notes."""
LARGEST_BYTES = 256 << 20
LARGEST_FLOPS = 8e9
_REACH_FACTOR, _REACH_BYTES = 4, 4 << 20

_ALWAYS = {
    "convolution",
    "convolution_backward",
    "_safe_softmax",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
    "embedding_dense_backward",
}
_HALF_PRECISION = {"mm", "addmm", "bmm", "baddbmm", "addmv", "mv", "linear", "linear_backward"}
_COPIES = {"copy_", "_to_copy", "clone", "embedding", "index_select", "gather", "index"}


@dataclasses.dataclass(frozen=True)
class Spec:
    """A tensor argument: shape, stride and dtype."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the smallest storage that holds it."""
        reach = 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride)) if math.prod(self.shape) else 0
        return reach * self.dtype.itemsize

    def resized(self, shape: tuple[int, ...]) -> Spec:
        """The same layout in another shape: dense, dimensions in the same order."""
        stride, step = [0] * len(shape), 1
        for i in sorted(range(len(shape)), key=lambda i: (self.stride[i], -i)):
            stride[i] = 0 if self.stride[i] == 0 and self.shape[i] > 1 else step
            step *= shape[i] if stride[i] else 1
        return Spec(shape, tuple(stride), self.dtype)

    def zeros(self) -> torch.Tensor:
        """A real tensor of this form."""
        flat = torch.zeros(self.nbytes // self.dtype.itemsize, dtype=self.dtype)
        return flat.as_strided(self.shape, self.stride)


@dataclasses.dataclass(frozen=True)
class Signature:
    """What is needed to run one operator alone."""

    func: Any
    args: tuple
    kwargs: tuple

    def specs(self) -> list[Spec]:
        """Its tensor arguments."""
        return _specs((self.args, self.kwargs))

    def run(self) -> None:
        """Run it on zeros."""
        with torch.no_grad():
            self.func(*_real(self.args), **{key: _real(value) for key, value in self.kwargs})

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs())


def may_hide(func) -> Callable[[list[torch.Tensor]], bool] | None:
    """For an operator overload, a test of its tensor inputs: may the kernel take memory the dispatcher cannot see?"""
    if func.namespace != "aten":
        return None
    name = func._schema.name.split("::")[-1]
    if name in _ALWAYS:
        return _always
    if name in _HALF_PRECISION:
        return _is_half
    if name in _COPIES or name.startswith(("_foreach", "_fused")):
        return None
    return _is_mixed


def _always(inputs: list[torch.Tensor]) -> bool:
    return True


def _is_half(inputs: list[torch.Tensor]) -> bool:
    return inputs[0].dtype in (torch.bfloat16, torch.float16)


def _is_mixed(inputs: list[torch.Tensor]) -> bool:
    if len(inputs) < 2:
        return False
    first = None
    for tensor in inputs:
        dtype = tensor.dtype
        if dtype.is_floating_point and tensor.dim():
            if first is None:
                first = dtype
            elif dtype != first:
                return True
    return False


def signature(func, args, kwargs) -> Signature:
    """The signature of one call."""
    return Signature(func, _form(args), tuple((key, _form(value)) for key, value in kwargs.items()))


def _form(item):
    if isinstance(item, torch.Tensor):
        return Spec(tuple(item.shape), tuple(item.stride()), item.dtype)
    if isinstance(item, (list, tuple)):
        return tuple(_form(i) for i in item)
    return item


def _real(item):
    if isinstance(item, Spec):
        return item.zeros()
    return tuple(_real(i) for i in item) if isinstance(item, tuple) else item


def _specs(item) -> list[Spec]:
    if isinstance(item, Spec):
        return [item]
    return [spec for part in item for spec in _specs(part)] if isinstance(item, tuple) else []


@dataclasses.dataclass
class Hidden:
    """Bytes per operator number, and what was too large to measure."""

    extra: dict[int, int]
    slack_bytes: int = 0
    notes: tuple[str, ...] = ()


def measure_hidden(signatures: dict[int, Signature], level: list[int], ceiling: list[int]) -> Hidden:
    """Hidden bytes of the operators that may reach their ceiling.

    Args:
        signatures: operator number -> signature.
        level: live bytes at each operator, without hidden memory.
        ceiling: per operator, the highest level of its phase.
    """
    where: dict[Signature, list[int]] = {}
    for operator, found in signatures.items():
        where.setdefault(found, []).append(operator)
    near = {found: max(level[i] - ceiling[i] for i in operators) for found, operators in where.items()}
    wanted = [f for f in where if near[f] + _REACH_FACTOR * f.nbytes + _REACH_BYTES > 0]
    wanted.sort(key=lambda f: (-near[f], f.nbytes))
    sizes, skipped = run_alone(wanted)
    extra = {i: size for found, size in sizes.items() if size for i in where[found]}
    if not skipped:
        return Hidden(extra)
    names = sorted({str(f.func) for f in skipped})
    slack = max((max(0, near[f] + f.nbytes) for f in skipped), default=0)
    return Hidden(extra, slack, (f"memory inside large kernels not measured: {', '.join(names)}",))


_known: dict[tuple[Signature, int], int] = {}


def run_alone(wanted: list[Signature]) -> tuple[dict[Signature, int], list[Signature]]:
    """(hidden bytes of each signature, those that were too large or out of time)."""
    plans = {found: [found] if _is_small(found) else smaller(found) for found in wanted}
    pieces = list(dict.fromkeys(p for plan in plans.values() if all(map(_is_small, plan)) for p in plan))
    threads = torch.get_num_threads()
    fresh = [piece for piece in pieces if (piece, threads) not in _known]
    if fresh:
        _known.update({(piece, threads): size for piece, size in _profiled(fresh).items()})
    taken = {piece: _known[piece, threads] for piece in pieces if (piece, threads) in _known}
    sizes: dict[Signature, int] = {}
    for found, plan in plans.items():
        if plan and all(piece in taken for piece in plan):
            sizes[found] = taken[found] if plan == [found] else _enlarged(found, plan, taken)
    return sizes, [found for found in wanted if found not in sizes]


def _is_small(found: Signature) -> bool:
    limit = LARGEST_FLOPS if "conv" in facts(found.func).name else LARGEST_FLOPS / 4
    return found.nbytes <= LARGEST_BYTES and _flops(found) <= limit


def _profiled(pieces: list[Signature]) -> dict[Signature, int]:
    from torch.profiler import record_function

    done: list[Signature] = []
    end = time.perf_counter() + SECONDS
    with torch.random.fork_rng(devices=[]), allocation_profile() as run:
        for found in pieces:
            if time.perf_counter() > end and len(done) > 2:
                break
            with contextlib.suppress(Exception):  # zeros are no valid input to it: left unmeasured
                found.run()  # kernels keep what they prepared on their first call
                args, kwargs = _real(found.args), {key: _real(value) for key, value in found.kwargs}
                with torch.no_grad(), record_function(f"tightfit:{len(done)}"):
                    out = found.func(*args, **kwargs)
                del out, args, kwargs
                done.append(found)
    events = run.profiler.kineto_results.events()
    memory = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    sizes: dict[Signature, int] = {}
    for event in events:
        if event.name().startswith("tightfit:"):
            begin, stop = event.start_ns(), event.start_ns() + event.duration_ns()
            net = highest = 0
            for moment, size in memory:
                if begin <= moment <= stop:
                    net += size
                    highest = max(highest, net)
            sizes[done[int(event.name()[9:])]] = max(0, highest - net)
    return sizes


# -- operators too large to run: smaller ones on a line ----------------------------------------------------------


def smaller(found: Signature) -> list[Signature]:
    """Small versions of a large matrix product: a corner, one with more rows, one with a longer inner dimension.

    What such a kernel takes is linear in either, so `_enlarged` can follow the two lines. [] for other operators.
    """
    specs, name = found.specs(), facts(found.func).name
    if "mm" not in name:
        return []
    rows, inner = specs[-2].shape[-2:]
    few, low = min(32, rows), min(64, inner)
    return [_cut(found, m, k) for m, k in ((few, low), (2 * few, low), (few, 2 * low))]


def _cut(found: Signature, rows: int, inner: int) -> Signature:
    *front, left, right = found.args[: 3 if "add" in facts(found.func).name else 2]
    left_cut = left.resized((*left.shape[:-2], rows, inner))
    right_cut = right.resized((*right.shape[:-2], inner, right.shape[-1]))
    if front and len(front[0].shape) == len(left.shape):
        front = [front[0].resized((*left.shape[:-2], rows, right.shape[-1]))]
    return dataclasses.replace(found, args=(*front, left_cut, right_cut))


def _enlarged(found: Signature, plan: list[Signature], taken: dict[Signature, int]) -> int:
    corner, taller, deeper = (taken[piece] for piece in plan)
    (rows, inner), (few, low) = found.specs()[-2].shape[-2:], plan[0].specs()[-2].shape[-2:]
    return round(corner + (taller - corner) / few * (rows - few) + (deeper - corner) / low * (inner - low))


def _flops(found: Signature) -> float:
    specs = found.specs()
    name = facts(found.func).name
    if "attention" in name:
        return 4.0 * math.prod(specs[0].shape) * specs[1].shape[-2]
    if "convolution_backward" in name:
        return 4.0 * math.prod(specs[0].shape) * math.prod(specs[2].shape[1:])
    if "convolution" in name:
        images, _, *size = specs[0].shape
        strides = [*found.args[3], *found.args[3]]  # one number may stand for all dimensions
        positions = images * math.prod(n / s for n, s in zip(size, strides))
        return 2.0 * positions * math.prod(specs[1].shape)
    if "mm" in name:
        left, right = specs[-2], specs[-1]
        return 2.0 * math.prod(left.shape) * right.shape[-1]
    return float(sum(math.prod(s.shape) for s in specs))
