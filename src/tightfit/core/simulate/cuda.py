"""What a step does on a CUDA device, from a machine without one. Modelled, not measured.

Fake tensors on "cuda" abort the process as soon as one requires grad, so the step is simulated on fake CPU tensors
with the kernels that a GPU would choose: fused attention (flash without a mask in half precision, else
memory-efficient), dropout with a boolean mask, foreach optimizers. Sizes are then rounded to the allocator's 512
bytes, and `reserved_bytes` replays the list of allocations through a model of the caching allocator.

Not modelled: cuDNN attention, expandable segments, retries after an emptied cache, the driver's context (300 to 600 MiB
outside the allocator).
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from tightfit.core.simulate.tracker import Trace

aten = torch.ops.aten

ROUND = 512
CUBLAS_WORKSPACE_BYTES = 2 * 8_519_680
"""cuBLAS's default workspace (8320 KiB; 32 MiB on Hopper), once for the forward and once for the backward thread."""

_MIB = 1 << 20
_STOCK_ATTENTION, _STOCK_DROPOUT = F.scaled_dot_product_attention, F.dropout


@contextlib.contextmanager
def kernels(device: str) -> Iterator[None]:
    """Inside, attention and dropout take the operators that a GPU would, recomputation included.

    A function mode would not do: it is suspended while `backward` runs, and with it in every checkpoint.
    """
    if device != "cuda":
        yield
        return
    F.scaled_dot_product_attention, F.dropout = _attention, _dropout  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention, F.dropout = _STOCK_ATTENTION, _STOCK_DROPOUT


def _dropout(input, p=0.5, training=True, inplace=False):
    if not training or p == 0 or inplace:
        return _STOCK_DROPOUT(input, p, training, inplace)
    return torch.native_dropout(input, p, True)[0]


def _attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
) -> torch.Tensor:
    width = query.shape[-1]
    half = query.dtype in (torch.float16, torch.bfloat16)
    fits = query.dim() == 4 and width == key.shape[-1] == value.shape[-1]
    if fits and half and attn_mask is None and width <= 256 and width % 8 == 0:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    grows = attn_mask is not None and attn_mask.requires_grad
    if not fits or width % (8 if half else 4) or grows or (enable_gqa and query.shape[1] != key.shape[1]):
        return _STOCK_ATTENTION(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    bias = None if attn_mask is None else _bias(attn_mask, query, key.shape[-2])
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, query.requires_grad, dropout_p, is_causal, scale=scale
    )[0]


def _bias(mask: torch.Tensor, query: torch.Tensor, keys: int) -> torch.Tensor:
    """The additive mask that the memory-efficient kernel wants: floating point, rows padded to 16 elements."""
    if mask.dtype == torch.bool:
        low = torch.full((), -math.inf, dtype=query.dtype)
        mask = torch.where(mask, torch.zeros((), dtype=query.dtype), low)
    if keys % 16:
        mask = F.pad(mask, (0, 16 - keys % 16))[..., :keys]
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], keys)


def on_device(trace: Trace) -> Trace:
    """The trace with every size rounded as the device's allocator does, and without what stays on the host."""
    events, exact = [], dict(trace.static)
    host = {number for number, size in exact.items() if trace.categories[number] == "optimizer" and size <= 8}
    for operator, number, change in trace.events:
        if number in host or trace.names[operator] == "external":
            host.add(number)
            continue
        before = exact.get(number, 0)
        exact[number] = before + change
        difference = rounded(exact[number]) - rounded(before)
        if difference:
            events.append((operator, number, difference))
    static = {number: 0 if number in host else rounded(size) for number, size in trace.static.items()}
    marks, kept = [], 0
    positions = iter([*trace.marks, (-1, -1)])
    phase, begin = next(positions)
    exact = dict(trace.static)
    for position in range(len(trace.events) + 1):
        while position == begin:
            marks.append((phase, kept))
            phase, begin = next(positions)
        if position < len(trace.events):
            operator, number, change = trace.events[position]
            if number not in host:
                before = exact.get(number, 0)
                exact[number] = before + change
                kept += rounded(exact[number]) != rounded(before)
    return dataclasses.replace(trace, events=events, static=static, marks=marks)


def rounded(size: int) -> int:
    """Bytes the CUDA allocator hands out for `size`."""
    return -(-size // ROUND) * ROUND


class CachingAllocator:
    """torch's CUDA caching allocator: two pools of segments, best fit, blocks split and merged.

    Requests up to 1 MiB come from 2 MiB segments, those below 10 MiB from 20 MiB segments, larger ones get their own
    rounded to 2 MiB. A block is split when what remains is usable: 512 bytes in the small pool, over 1 MiB in the
    large one.

    Example:
        >>> allocator = CachingAllocator()
        >>> block = allocator.allocate(3 << 20)
        >>> allocator.reserved >> 20
        20
    """

    def __init__(self):
        self.reserved = 0
        self._free: dict[bool, list[tuple[int, int]]] = {True: [], False: []}  # small? -> sorted (size, address)
        self._size: dict[int, int] = {}
        self._before: dict[int, int] = {}
        self._after: dict[int, int] = {}
        self._is_free: set[int] = set()
        self._small: set[int] = set()
        self._top = 0

    def allocate(self, size: int) -> int:
        """Address of a block of at least `size` bytes."""
        size = max(ROUND, rounded(size))
        small = size <= _MIB
        pool = self._free[small]
        place = bisect.bisect_left(pool, (size, -1))
        if place < len(pool):
            _, address = pool.pop(place)
            self._is_free.discard(address)
        else:
            address = self._segment(size, small)
        rest = self._size[address] - size
        if rest >= ROUND if small else rest > _MIB:
            self._split(address, size, small)
        return address

    def free(self, address: int) -> None:
        """Give a block back; it merges with free neighbours of its segment."""
        small = address in self._small
        after, before = self._after.get(address), self._before.get(address)
        if after in self._is_free:
            self._take(after, small)
            self._join(address, after)
        if before in self._is_free:
            self._take(before, small)
            self._join(before, address)
            address = before
        self._is_free.add(address)
        bisect.insort(self._free[small], (self._size[address], address))

    def _segment(self, size: int, small: bool) -> int:
        if small:
            length = 2 * _MIB
        elif size < 10 * _MIB:
            length = 20 * _MIB
        else:
            length = -(-size // (2 * _MIB)) * 2 * _MIB
        self.reserved += length
        address, self._top = self._top, self._top + length
        self._size[address] = length
        if small:
            self._small.add(address)
        return address

    def _split(self, address: int, size: int, small: bool) -> None:
        rest, after = address + size, self._after.get(address)
        self._size[rest], self._size[address] = self._size[address] - size, size
        self._before[rest], self._after[address] = address, rest
        if after is not None:
            self._after[rest], self._before[after] = after, rest
        if small:
            self._small.add(rest)
        self._is_free.add(rest)
        bisect.insort(self._free[small], (self._size[rest], rest))

    def _take(self, address: int, small: bool) -> None:
        pool = self._free[small]
        pool.pop(bisect.bisect_left(pool, (self._size[address], address)))
        self._is_free.discard(address)

    def _join(self, left: int, right: int) -> None:
        self._size[left] += self._size.pop(right)
        after = self._after.pop(right, None)
        self._before.pop(right, None)
        self._small.discard(right)
        if after is None:
            self._after.pop(left, None)
        else:
            self._after[left], self._before[after] = after, left


def replay(trace: Trace, steps: int = 2) -> int:
    """Bytes the caching allocator has reserved after so many steps."""
    allocator = CachingAllocator()
    for size in trace.static.values():
        if size:
            allocator.allocate(size)
    fixed = trace.static.keys()
    for _ in range(steps):
        held: dict[int, int] = {}
        for _, number, change in trace.events:
            if number in fixed:
                continue
            if number in held:  # freed, or resized: another block
                allocator.free(held.pop(number))
            if change > 0:
                held[number] = allocator.allocate(change)
        for address in held.values():
            allocator.free(address)
    return allocator.reserved
