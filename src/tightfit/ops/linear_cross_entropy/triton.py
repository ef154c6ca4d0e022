"""Softmax statistics and gradient of a block of logits, each in one pass, in the type the product came in.

A row is cut into parts that different programs work on; nothing is summed across programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tightfit.ops import kernels

PART = 8192
"""Logits of a row that one program reads."""
BLOCK = 2048


def statistics(logits: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Largest z, sum of exp(z - largest) and sum of z of each row, in float32, for z = cap(scale * logits).

    Args:
        logits: (n, K), contiguous.
    """
    rows, count = logits.shape
    parts = triton.cdiv(count, PART)
    top, total, whole = torch.empty(3, rows, parts, device=logits.device).unbind()
    kernels.launch(
        _statistics,
        (rows, parts),
        logits,
        logits,
        top,
        total,
        whole,
        count,
        scale,
        softcap or 1.0,
        CAPPED=softcap is not None,
        PART=PART,
        BLOCK=BLOCK,
        num_warps=8,
    )
    if parts == 1:
        return top[:, 0], total[:, 0], whole[:, 0]
    most = top.amax(1)
    return most, (total * torch.exp(top - most.unsqueeze(1))).sum(1), whole.sum(1)


def gradient_(
    logits: Tensor,
    top: Tensor,
    total: Tensor,
    target: Tensor,
    scale: float,
    softcap: float | None,
    share: float,
    spread: float,
) -> Tensor:
    """Overwrites logits with d loss / d (scale * logits) of sum over rows: (softmax - wanted) * cap'.

    Args:
        logits: (n, K), contiguous.
        top, total: of all rows of the head, (n,); softmax is exp(z - top) / total.
        target: (n,) columns of the targets; -1 for none of these.
        share: wanted probability of the target.
        spread: wanted probability of each column beside that.
    """
    rows, count = logits.shape
    kernels.launch(
        _gradient,
        (rows, triton.cdiv(count, PART)),
        logits,
        logits,
        top,
        total,
        target,
        count,
        scale,
        softcap or 1.0,
        share,
        spread,
        CAPPED=softcap is not None,
        PART=PART,
        BLOCK=BLOCK,
        num_warps=8,
    )
    return logits


@triton.jit
def _tanh(x):
    small = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - small) / (1.0 + small)
    return tl.where(x < 0, -size, size)


@triton.jit
def _capped(start, at, inside, scale, softcap, CAPPED: tl.constexpr):
    z = tl.load(start + at, mask=inside, other=0.0).to(tl.float32) * scale
    if CAPPED:
        z = _tanh(tl.div_rn(z, softcap)) * softcap
    return z


@triton.jit
def _statistics(
    logits,
    top,
    total,
    whole,
    count,
    scale,
    softcap,
    CAPPED: tl.constexpr,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start = logits + row * count
    first = part * PART
    # a running largest in every lane; the lanes meet once at the end
    most = tl.full((BLOCK,), float("-inf"), tl.float32)
    summed = tl.zeros((BLOCK,), tl.float32)
    plain = tl.zeros((BLOCK,), tl.float32)
    for offset in range(0, PART, BLOCK):
        at = first + offset + tl.arange(0, BLOCK)
        inside = at < count
        z = _capped(start, at, inside, scale, softcap, CAPPED)
        plain += tl.where(inside, z, 0.0)
        z = tl.where(inside, z, float("-inf"))
        higher = tl.maximum(most, z)
        # a lane without any number above -inf adds nothing, and exp(-inf - -inf) would be NaN
        base = tl.where(higher == float("-inf"), 0.0, higher)
        summed = summed * tl.exp(most - base) + tl.exp(z - base)
        most = higher
    found = tl.max(most, axis=0)
    base = tl.where(found == float("-inf"), 0.0, found)
    place = row * tl.num_programs(1) + part
    tl.store(top + place, found)
    tl.store(total + place, tl.sum(summed * tl.exp(most - base), axis=0))
    tl.store(whole + place, tl.sum(plain, axis=0))


@triton.jit
def _gradient(
    logits,
    top,
    total,
    target,
    count,
    scale,
    softcap,
    share,
    spread,
    CAPPED: tl.constexpr,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * PART
    start = logits + row * count
    most, inverse, wanted = tl.load(top + row), 1.0 / tl.load(total + row), tl.load(target + row)
    for offset in range(0, PART, BLOCK):
        at = first + offset + tl.arange(0, BLOCK)
        inside = at < count
        z = _capped(start, at, inside, scale, softcap, CAPPED)
        slope = tl.exp(z - most) * inverse - spread
        slope = tl.where(at == wanted, slope - share, slope)
        if CAPPED:
            ratio = z / softcap
            slope = slope * (1.0 - ratio * ratio)
        tl.store(start + at, slope.to(logits.dtype.element_ty), mask=inside)
