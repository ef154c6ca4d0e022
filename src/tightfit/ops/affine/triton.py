"""Affine codes in one pass over the tensor each way; the bytes are those of `tightfit.ops.affine.torch._pack`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tightfit.ops import kernels

TILE = 2048
"""Elements that one program works on, about."""


def pack(x: Tensor, group: int, width: int, bits: int, stochastic: bool = False) -> Tensor:
    """(..., I) floating point -> (groups, bytes of one) uint8.

    Args:
        group: channels of one group, even.
        width: I rounded up to whole groups; the last channel stands for the missing ones.
        stochastic: round at random, by numbers that follow torch's generator of the device.
    """
    flat = x.reshape(-1, x.shape[-1])
    per_row, ranges = width // group, 8 if bits == 8 else 4
    count, row_bytes = flat.shape[0] * per_row, group * bits // 8 + ranges
    packed = torch.empty(count, row_bytes, dtype=torch.uint8, device=x.device)
    seed = torch.randint(2**31, (1,), device=x.device) if stochastic else packed
    columns = kernels.power_of_two(group * bits // 8)
    block = max(1, TILE // columns)
    kernels.launch(
        _pack,
        (triton.cdiv(count, block),),
        x,
        flat,
        packed,
        seed,
        count,
        x.shape[-1],
        per_row,
        flat.stride(0),
        flat.stride(1),
        GROUP=group,
        BITS=bits,
        STOCHASTIC=stochastic,
        BLOCK=block,
        COLUMNS=columns,
    )
    return packed


def unpack(packed: Tensor, shape: Sequence[int], dtype: torch.dtype, group: int, width: int, bits: int) -> Tensor:
    """What `pack` made, back as a contiguous tensor of this shape and type."""
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    packed = packed.contiguous()
    columns = kernels.power_of_two(group)
    block = max(1, TILE // columns)
    kernels.launch(
        _unpack,
        (triton.cdiv(packed.shape[0], block),),
        packed,
        packed,
        out,
        packed.shape[0],
        shape[-1],
        width // group,
        GROUP=group,
        BITS=bits,
        BLOCK=block,
        COLUMNS=columns,
    )
    return out


@triton.jit
def _codes(x, low, step, noise, LEVELS: tl.constexpr):
    scaled = tl.div_rn(x - low[:, None], tl.maximum(step, 1.1754943508222875e-38)[:, None]) + noise
    codes = tl.minimum(tl.maximum(tl.floor(scaled), 0.0), LEVELS)
    return tl.where(scaled == scaled, codes, 0.0).to(tl.int32)


@triton.jit
def _least(x, inside):
    return tl.min(tl.where(inside, x, float("inf")), axis=1)


@triton.jit
def _most(x, inside):
    return tl.max(tl.where(inside, x, float("-inf")), axis=1)


@triton.jit
def _nan_count(x, inside):
    return tl.sum(tl.where(inside & (x != x), 1, 0), axis=1)


@triton.jit
def _pack(
    x,
    packed,
    seed,
    count,
    channels,
    per_row,
    row_stride,
    channel_stride,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A row of the tile is a group, a column one byte of codes."""
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    byte = tl.arange(0, COLUMNS)
    CODES: tl.constexpr = GROUP * BITS // 8
    ROW: tl.constexpr = CODES + BITS
    LEVELS: tl.constexpr = 2**BITS - 1
    inside = (group < count)[:, None] & (byte < CODES)[None, :]
    start = x + (group // per_row * row_stride)[:, None]
    first = (group % per_row * GROUP)[:, None]
    PER_BYTE: tl.constexpr = 8 // BITS
    channel = first + byte[None, :] * PER_BYTE
    a = tl.load(start + tl.minimum(channel, channels - 1) * channel_stride, mask=inside, other=0.0).to(tl.float32)
    low, high, nans = _least(a, inside), _most(a, inside), _nan_count(a, inside)
    if BITS == 4:
        b = tl.load(start + tl.minimum(channel + 1, channels - 1) * channel_stride, mask=inside, other=0.0)
        b = b.to(tl.float32)
        low, high = tl.minimum(low, _least(b, inside)), tl.maximum(high, _most(b, inside))
        nans += _nan_count(b, inside)
        # rounded outwards, so that the range still holds every element
        low = (low - tl.abs(low) * 0.0009765625).to(tl.float16).to(tl.float32)
    step = tl.div_rn(high - low, LEVELS * 1.0)
    if BITS == 4:
        step = (step * 1.001953125).to(tl.float16).to(tl.float32)
    low, step = tl.where(nans > 0, float("nan"), low), tl.where(nans > 0, float("nan"), step)

    noise, other = 0.5, 0.5
    if STOCHASTIC:
        key = tl.load(seed)
        place = group[:, None] * GROUP + byte[None, :] * PER_BYTE
        noise = tl.rand(key, place)
        if BITS == 4:
            other = tl.rand(key, place + 1)
    codes = _codes(a, low, step, noise, LEVELS)
    if BITS == 4:
        codes = codes | (_codes(b, low, step, other, LEVELS) << 4)
    out = packed + group[:, None] * ROW
    tl.store(out + byte[None, :], codes.to(tl.uint8), mask=inside)

    # byte by byte: a group's range lies at no multiple of its size
    at = tl.arange(0, BITS)[None, :]
    if BITS == 8:
        word = tl.where(at < 4, step.to(tl.int32, bitcast=True)[:, None], low.to(tl.int32, bitcast=True)[:, None])
    else:
        lower = step.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        word = (lower | (low.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) << 16))[:, None]
    tl.store(out + CODES + at, ((word >> (at % 4 * 8)) & 255).to(tl.uint8), mask=(group < count)[:, None])


@triton.jit
def _word(start, mask):
    """Four bytes as one integer."""
    word = tl.load(start, mask=mask, other=0).to(tl.int32)
    for place in tl.static_range(1, 4):
        word |= tl.load(start + place, mask=mask, other=0).to(tl.int32) << (8 * place)
    return word


@triton.jit
def _unpack(
    packed,
    out,
    count,
    channels,
    per_row,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A row of the tile is a group, a column one channel."""
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, COLUMNS)[None, :]
    CODES: tl.constexpr = GROUP * BITS // 8
    ROW: tl.constexpr = CODES + BITS
    exists = group < count
    channel = (group % per_row * GROUP)[:, None] + column
    inside = exists[:, None] & (column < GROUP) & (channel < channels)
    start = packed + group * ROW
    if BITS == 8:
        codes = tl.load(start[:, None] + column, mask=inside, other=0).to(tl.int32)
        step = _word(start + CODES, exists).to(tl.float32, bitcast=True)
        low = _word(start + CODES + 4, exists).to(tl.float32, bitcast=True)
    else:
        codes = tl.load(start[:, None] + column // 2, mask=inside, other=0).to(tl.int32) >> (column % 2 * 4) & 15
        word = _word(start + CODES, exists)
        step = (word & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        low = ((word >> 16) & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    value = codes.to(tl.float32) * step[:, None] + low[:, None]
    place = (group // per_row * channels)[:, None] + channel
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)
