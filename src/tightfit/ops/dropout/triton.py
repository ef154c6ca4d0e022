"""A dropout's mask to bits and back onto a gradient, in one pass each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tightfit.ops import kernels

BLOCK = 1024


def pack(mask: Tensor) -> Tensor:
    """What `tightfit.ops.bits.pack` gives for a boolean tensor."""
    flat = mask.contiguous().view(torch.uint8)
    packed = torch.empty(triton.cdiv(mask.numel(), 8), dtype=torch.uint8, device=mask.device)
    kernels.launch(_pack, (triton.cdiv(len(packed), BLOCK),), mask, flat, packed, mask.numel(), BLOCK=BLOCK)
    return packed


def times_noise(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """x times `scale` (0-dim, of its type) where a bit is set, else times 0."""
    x = x.contiguous()
    out = torch.empty_like(x)
    kernels.launch(_times_noise, (triton.cdiv(x.numel(), BLOCK),), x, x, packed, scale, out, x.numel(), BLOCK=BLOCK)
    return out


@triton.jit
def _pack(mask, packed, count, BLOCK: tl.constexpr):
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    place = tl.arange(0, 8)[None, :]
    at = byte[:, None] * 8 + place
    bit = tl.load(mask + at, mask=at < count, other=0).to(tl.int32)
    tl.store(packed + byte, tl.sum(bit << place, axis=1).to(tl.uint8), mask=byte * 8 < count)


@triton.jit
def _times_noise(x, packed, scale, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    bit = tl.load(packed + at // 8, mask=inside, other=0).to(tl.int32) >> (at % 8).to(tl.int32) & 1
    noise = bit.to(tl.float32) * tl.load(scale).to(tl.float32)
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * noise
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)
