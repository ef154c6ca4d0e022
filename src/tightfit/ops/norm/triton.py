"""The backward of a norm in one pass over its input and its gradient.

A program walks over rows and adds up its share of the gradients of weight and bias; the shares of all programs are
summed at last, in the same order every time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tightfit.ops import kernels


def backward(
    x: Tensor,
    grad: Tensor,
    weight: Tensor | None,
    needs: Sequence[bool],
    *,
    shape: Sequence[int],
    dtype: torch.dtype,
    like_bias: Tensor | None = None,
    mean: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
    centred: bool = False,
    normalised: bool = False,
) -> tuple[Tensor | None, ...]:
    """Gradients of input, weight and bias of y = (offset + weight) * (x - mean) * scale + bias.

    Args:
        x: the input, or with `normalised` the rows (x - mean) * scale.
        grad: of the output, in the shape of x.
        weight: None for ones.
        needs: which gradients are wanted; the others come as None.
        shape: of a row.
        dtype: of the input's gradient.
        like_bias: the bias, for the type of its gradient.
        mean, scale: a number a row; without `scale` it is 1 / sqrt(mean(x^2) + eps).
        centred: the mean depends on the input, too (a layer norm).
    """
    width = math.prod(shape)
    rows, flat_grad = _rows(x, width), _rows(grad, width)
    count = rows.shape[0]
    sums = needs[1] or needs[2]
    programs = min(count, kernels.programs(x)) if sums else count
    grad_x = torch.empty(x.shape, dtype=dtype, device=x.device) if needs[0] else None
    shares = [torch.empty(programs, width, device=x.device) if need else None for need in needs[1:]]
    block = kernels.power_of_two(width)
    kernels.launch(
        _backward,
        (programs,),
        x,
        rows,
        flat_grad,
        x if weight is None else weight.reshape(-1).contiguous(),
        x if mean is None else mean.contiguous(),
        x if scale is None else scale.contiguous(),
        x if grad_x is None else grad_x,
        *(x if share is None else share for share in shares),
        count,
        width,
        rows.stride(0),
        flat_grad.stride(0),
        eps,
        offset,
        WEIGHTED=weight is not None,
        SHIFTED=mean is not None,
        SCALED=scale is not None,
        CENTRED=centred,
        NORMALISED=normalised,
        WANT_X=needs[0],
        WANT_WEIGHT=needs[1],
        WANT_BIAS=needs[2],
        BLOCK=block,
        num_warps=4 if block <= 1024 else 8 if block <= 4096 else 16,
    )
    found = [
        None if share is None or like is None else share.sum(0).to(like.dtype).view(like.shape)
        for share, like in zip(shares, (weight, like_bias))
    ]
    return grad_x, *found


def _rows(x: Tensor, width: int) -> Tensor:
    """(rows, width), a row's elements side by side."""
    flat = x.reshape(math.prod(x.shape) // width, width)
    return flat if flat.stride(1) == 1 or width == 1 else flat.contiguous()


@triton.jit
def _backward(
    x,
    grad,
    weight,
    mean,
    scale,
    grad_x,
    share_weight,
    share_bias,
    count,
    width,
    x_stride,
    grad_stride,
    eps,
    offset,
    WEIGHTED: tl.constexpr,
    SHIFTED: tl.constexpr,
    SCALED: tl.constexpr,
    CENTRED: tl.constexpr,
    NORMALISED: tl.constexpr,
    WANT_X: tl.constexpr,
    WANT_WEIGHT: tl.constexpr,
    WANT_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    factor = tl.full((BLOCK,), 1.0, tl.float32)
    if WEIGHTED:
        factor = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32) + offset
    sum_weight = tl.zeros((BLOCK,), tl.float32)
    sum_bias = tl.zeros((BLOCK,), tl.float32)
    for row in range(program, count, tl.num_programs(0)):
        unit = tl.load(x + row * x_stride + at, mask=inside, other=0.0).to(tl.float32)
        pull = tl.load(grad + row * grad_stride + at, mask=inside, other=0.0).to(tl.float32)
        if SCALED:
            inverse = tl.load(scale + row).to(tl.float32)
        else:
            inverse = tl.rsqrt(tl.sum(unit * unit, axis=0) / width + eps)
        if SHIFTED:
            unit = tl.where(inside, unit - tl.load(mean + row).to(tl.float32), 0.0)
        if not NORMALISED:
            unit = unit * inverse
        if WANT_WEIGHT:
            sum_weight += pull * unit
        if WANT_BIAS:
            sum_bias += pull
        if WANT_X:
            pull = pull * factor
            out = pull - unit * (tl.sum(pull * unit, axis=0) / width)
            if CENTRED:
                out = out - tl.sum(pull, axis=0) / width
            out = out * inverse
            tl.store(grad_x + row * width + at, out.to(grad_x.dtype.element_ty), mask=inside)
    if WANT_WEIGHT:
        tl.store(share_weight + program * width + at, sum_weight, mask=inside)
    if WANT_BIAS:
        tl.store(share_bias + program * width + at, sum_bias, mask=inside)
