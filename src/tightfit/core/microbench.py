"""Operators alone, at the temperature they have in a training step: the measurements behind `calibrate`.

In a step most operands were written long ago and results go to memory that is in no cache. So operands are slices of
pools larger than the caches, taken in turn, and as many results are kept. Every measurement is repeated in passes
over all of them, so that a busy second of the machine does not fall on one operator alone; the median counts.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from tightfit.ops.probing import PROBES

aten = torch.ops.aten

SIZES = (1 << 8, 1 << 12, 1 << 16, 1 << 21)
ROW, WIDE_ROW = 256, 1 << 13
POOL = 1 << 23
"""Elements of a pool."""
MOST_SLICES = 512

SINGLE = (8, 32, 128, 512, 2048)
BATCHED = (16, 64, 256, 1024)
BATCH = 8
LARGEST_PRODUCT, LARGEST_RESULT = 1 << 28, 1 << 22
LENGTHS = (32, 128, 512)
CHANNELS = 64

FRESH_BYTES = 32 << 20
"""glibc hands blocks above this size back to the system when they are freed, so each new one is faulted in again."""

HEAP_BYTES = 128 << 20

Key = tuple[Any, ...]
WINDOW = 1.5e-3
WARM_SECONDS = 0.008


def clock() -> float:
    """Seconds that count as work: CPU time with one thread, wall time with several."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


@dataclasses.dataclass(frozen=True)
class Probe:
    """One measurement: `run` gets a counter, to take its operands in turn; `made` is the bytes of one result."""

    key: Key
    run: Callable[[int], Any]
    made: int = 0


@dataclasses.dataclass(frozen=True)
class Pools:
    """Memory that operands are taken from; `scratch` is written to."""

    left: torch.Tensor
    right: torch.Tensor
    scratch: torch.Tensor

    @classmethod
    def of(cls, dtype: torch.dtype) -> Pools:
        """Pools of values between 0.25 and 1.25."""
        left = (torch.rand(POOL) + 0.25).to(dtype)
        return cls(left, left.flip(0), left.clone())


def warm_heap() -> torch.Tensor:
    """Make the heap large and keep it so while the result lives: results then never fault in new memory.

    glibc serves blocks from the heap up to the size of the largest one it was ever given back, and returns the heap's
    free top to the system, so a block is left at the top.
    """
    torch.full((FRESH_BYTES // 4 - 1024,), 1.0)
    below = [torch.full((HEAP_BYTES // 32,), 1.0) for _ in range(8)]
    top = torch.empty(HEAP_BYTES // 32)
    del below
    return top


def slices(pool: torch.Tensor, *shape: int) -> Callable[[int], torch.Tensor]:
    """The slice of a pool for a turn."""
    size = 1
    for n in shape:
        size *= n
    count = max(1, min(MOST_SLICES, pool.numel() // size))
    step = pool.numel() // count
    parts = [pool[i * step : i * step + size].view(shape) for i in range(count)]
    return lambda turn: parts[turn % count]


def measure_probe(probe: Probe) -> float:
    """Seconds of one call, results kept in a ring as large as a pool."""
    count = max(1, min(MOST_SLICES, 4 * POOL // probe.made)) if probe.made else 1
    kept: list[Any] = []
    end = time.perf_counter() + WARM_SECONDS
    while len(kept) < count:
        kept.append(probe.run(len(kept)))
        if time.perf_counter() > end:
            break
    count = len(kept)
    start = clock()
    kept[0] = probe.run(0)
    inner = max(1, min(2000, round(WINDOW / max(clock() - start, 1e-7))))
    run = probe.run
    start = clock()
    for turn in range(1, inner + 1):
        kept[turn % count] = run(turn)
    return (clock() - start) / inner


def medians(probes: Callable[[int], Iterator[Probe]], *, limit: float, passes: int = 7) -> dict[Key, float]:
    """Median seconds of every probe; at least two passes, then as many as the limit of seconds allows.

    Args:
        probes: pass number -> probes; the same keys in each pass.
    """
    samples: dict[Key, list[float]] = {}
    begin = time.perf_counter()
    for turn in range(passes):
        for probe in probes(turn):
            samples.setdefault(probe.key, []).append(measure_probe(probe))
        spent = time.perf_counter() - begin
        if turn and spent * (turn + 2) / (turn + 1) > limit:
            break
    return {key: statistics.median_low(found) for key, found in samples.items()}


# -- elementwise, reductions, normalisation, random numbers -----------------------------------------------------------


def kind_probes(pools: Pools) -> Iterator[Probe]:
    """Every kind at every size; the keys are (kind, elements)."""
    for size in SIZES:
        shape = (size // ROW, ROW)
        a, b, out = (slices(pool, *shape) for pool in (pools.left, pools.right, pools.scratch))
        written = size * pools.left.element_size()
        for kind, run in _in_place(b, out):
            yield Probe((kind, size), run)
        for kind, run in (*_mapping(a, b), *_reordering(pools, size)):
            yield Probe((kind, size), run, written)
        for kind, run in _normalising(pools, size):
            yield Probe((kind, size), run, written)
        for kind, run in _reducing(a):
            yield Probe((kind, size), run)
        for kind, run in _own(a):
            yield Probe((kind, size), run, written)
        yield Probe(("fused", size), _fused(size, pools))


def _in_place(b, out) -> Iterator[tuple[str, Callable]]:
    yield "add_", lambda t: out(t).add_(b(t), alpha=1e-4)
    yield "scale_", lambda t: out(t).mul_(1.0)
    yield "lerp_", lambda t: out(t).lerp_(b(t), 0.1)
    yield "addcmul_", lambda t: out(t).addcmul_(b(t), b(t), value=1e-4)
    yield "addcdiv_", lambda t: out(t).addcdiv_(b(t), b(t), value=1e-4)
    yield "fill", lambda t: out(t).fill_(0.5)
    yield "bernoulli_", lambda t: out(t).bernoulli_(0.9)
    yield "normal_", lambda t: out(t).normal_()


def _mapping(a, b) -> Iterator[tuple[str, Callable]]:
    yield "add", lambda t: a(t) + b(t)
    yield "scale", lambda t: a(t) * 0.5
    yield "div", lambda t: a(t) / 3.0
    yield "sqrt", lambda t: torch.sqrt(a(t))
    yield "copy", lambda t: a(t).clone()
    yield "exp", lambda t: torch.exp(a(t))
    yield "tanh", lambda t: torch.tanh(a(t))
    yield "gelu", lambda t: F.gelu(a(t))
    yield "gelu_backward", lambda t: aten.gelu_backward(a(t), b(t))
    yield "silu", lambda t: F.silu(a(t))
    yield "silu_backward", lambda t: aten.silu_backward(a(t), b(t))
    yield "sort", lambda t: a(t).sort(-1)


def _reducing(a) -> Iterator[tuple[str, Callable]]:
    yield "sum", lambda t: a(t).sum(0)
    yield "mean", lambda t: a(t).mean(-1)


def _own(a) -> Iterator[tuple[str, Callable]]:
    for operator, make in PROBES.items():
        run = make(a(0))
        yield operator, lambda t, run=run: run(a(t))


def _reordering(pools: Pools, size: int) -> Iterator[tuple[str, Callable]]:
    wide = slices(pools.left, max(1, size // 4096), min(16, size // ROW), 4, 64)
    yield "permuted", lambda t: wide(t).transpose(1, 2).contiguous()
    square = slices(pools.left, max(1, size // 4096), min(64, size // 64), 64)
    yield "transposed", lambda t: square(t).transpose(1, 2).contiguous()
    zeros = torch.zeros(size, dtype=pools.left.dtype)
    yield "sqrt_zero", lambda t: torch.sqrt(zeros)


def _normalising(pools: Pools, size: int) -> Iterator[tuple[str, Callable]]:
    rows = (size // ROW, ROW)
    a, b = slices(pools.left, *rows), slices(pools.right, *rows)
    dtype = pools.left.dtype
    scale, statistic = pools.left[:ROW], pools.left[: size // ROW].view(-1, 1)
    yield "softmax", lambda t: torch.softmax(a(t), -1)
    yield "safe_softmax", lambda t: aten._safe_softmax(a(t), -1)
    yield "softmax_backward", lambda t: aten._softmax_backward_data(a(t), b(t), -1, dtype)
    long = (max(1, size // WIDE_ROW), min(size, WIDE_ROW))
    c, d = slices(pools.left, *long), slices(pools.right, *long)
    yield "log_softmax", lambda t: torch.log_softmax(c(t), -1)
    yield "log_softmax_backward", lambda t: aten._log_softmax_backward_data(c(t), d(t), -1, dtype)
    yield "layer_norm", lambda t: F.layer_norm(a(t), (ROW,), scale, scale)
    every = [True, True, True]
    yield (
        "layer_norm_backward",
        lambda t: aten.native_layer_norm_backward(a(t), b(t), [ROW], statistic, statistic, scale, scale, every),
    )


def _fused(size: int, pools: Pools) -> Callable[[int], Any]:
    parameter, moment, square = (slices(p, size) for p in (pools.scratch, pools.left, pools.right))
    step = [torch.tensor(3.0)]
    settings: dict[str, Any] = {"lr": 0.0, "beta1": 1.0, "beta2": 1.0, "weight_decay": 0.0, "eps": 1e-8}

    def run(turn: int) -> None:
        first, second = moment(turn), square(turn)
        torch._fused_adamw_(
            [parameter(turn)], [first], [first], [second], [], step, amsgrad=False, maximize=False, **settings
        )

    return run


# -- matrix products and attention ------------------------------------------------------------------------------------


def product_probes(pools: Pools, turn: int) -> Iterator[Probe]:
    """The grids of products; keys ("single" or "batched", m, n, k). Passes take the operands' layouts in turn."""
    for how, sizes, batch in (("single", SINGLE, 1), ("batched", BATCHED, BATCH)):
        for m, n, k in itertools.product(sizes, repeat=3):
            if batch * m * n * k <= LARGEST_PRODUCT and batch * m * n <= LARGEST_RESULT:
                run = _product(pools, batch, (m, n, k), turn % 3)
                yield Probe((how, m, n, k), run, 4 * batch * m * n)


def _product(pools: Pools, batch: int, dims: tuple[int, int, int], layout: int) -> Callable[[int], Any]:
    m, n, k = dims
    lead = (batch,) if batch > 1 else ()
    left, right = slices(pools.left, *lead, m, k), slices(pools.right, *lead, k, n)
    if layout == 0:  # the forward of a linear: its weight is (n, k)
        weight = slices(pools.right, *lead, n, k)
        return lambda turn: left(turn) @ weight(turn).transpose(-1, -2)
    if layout == 1:
        return lambda turn: left(turn) @ right(turn)
    upright = slices(pools.left, *lead, k, m)
    return lambda turn: upright(turn).transpose(-1, -2) @ right(turn)


def attention_probes(pools: Pools) -> Iterator[Probe]:
    """Fused attention; keys ("forward" or "backward", length)."""
    forward = aten._scaled_dot_product_flash_attention_for_cpu
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
    for length in LENGTHS:
        shape = (2, 4, length, CHANNELS)
        query, key, value = (slices(pool, *shape) for pool in (pools.left, pools.right, pools.scratch))
        mask = torch.zeros(2, 1, length, length, dtype=pools.left.dtype)
        made = 8 * length * CHANNELS * pools.left.element_size()

        def run(turn, q=query, k=key, v=value, mask=mask):
            return forward(q(turn), k(turn), v(turn), attn_mask=mask)

        out, statistic = run(0)

        def back(turn, q=query, k=key, v=value, out=out, statistic=statistic, mask=mask):
            return backward(q(turn + 1), q(turn), k(turn), v(turn), out, statistic, 0.0, False, attn_mask=mask)

        yield Probe(("forward", length), run, made)
        yield Probe(("backward", length), back, 3 * made)


def fresh_probes() -> Iterator[Probe]:
    """A block new from the system each time, and one that is known; keys "fresh" and "known"."""
    count = 2 * FRESH_BYTES // 4
    known = torch.zeros(count)
    yield Probe(("known",), lambda turn: known.fill_(1.0))
    yield Probe(("fresh",), lambda turn: torch.full((count,), 1.0) is None)
