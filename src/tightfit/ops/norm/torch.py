"""Norms with own backwards: the input is kept, and a row's statistics."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tightfit.ops.autograd import autocast_dtype, refuse_second_derivative
from tightfit.ops.source import attach

LOW_PRECISION = (torch.bfloat16, torch.float16)


def layer_norm(x: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """`F.layer_norm`, bit for bit, whose output is rebuilt from `x` by the linear layers behind it.

    Keeps x and two numbers a row, as stock does; the output need not be kept by anybody.

    Raises:
        RuntimeError: on double backward.

    Example:
        >>> x = torch.arange(4.0).view(1, 4).requires_grad_()
        >>> layer_norm(x, (4,), torch.ones(4), None, 0.0).tolist()[0][0] < -1.3
        True
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return F.layer_norm(x, shape, weight, bias, eps)
    out = _LayerNorm.apply(x, shape, weight, bias, eps)
    return attach(out, (x,), lambda kept: F.layer_norm(kept, shape, weight, bias, eps))


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shape, weight, bias, eps):
        wide = x.float() if autocast_dtype(x.device.type) is not None else x
        out, mean, rstd = torch.native_layer_norm(wide, shape, weight, bias, eps)
        ctx.shape = shape
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        return out

    @staticmethod
    def backward(ctx, grad):
        refuse_second_derivative("layer_norm")
        x, mean, rstd, weight, bias = ctx.saved_tensors
        needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[2], ctx.needs_input_grad[3]]
        wide = x.to(grad.dtype)
        grad_x, grad_w, grad_b = torch.ops.aten.native_layer_norm_backward(
            grad.contiguous(), wide, ctx.shape, mean, rstd, weight, bias, needs
        )
        return None if grad_x is None else grad_x.to(x.dtype), None, grad_w, grad_b, None


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, stock: Callable[[Tensor], Tensor], *, offset: float = 0.0
) -> Tensor:
    """A model's own root-mean-square norm, of which only the input is kept.

    Args:
        x: (..., d).
        weight: (d,).
        stock: the model's forward, which computes `(offset + weight) * x / sqrt(mean(x^2) + eps)`; its output is
            returned bit for bit.
        offset: 1 where the model stores the weight around zero (Gemma).

    The backward is the derivative of that formula in float32 (float64 for float64), as reference.py has it.

    Raises:
        RuntimeError: on double backward.

    Example:
        >>> x, w = torch.ones(1, 4, requires_grad=True), torch.ones(4)
        >>> rms_norm(x, w, 0.0, lambda t: w * t).tolist()
        [[1.0, 1.0, 1.0, 1.0]]
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return stock(x)
    return attach(_RMSNorm.apply(x, weight, eps, stock, offset), (x,), stock)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, stock, offset):
        ctx.eps, ctx.offset = eps, offset
        ctx.save_for_backward(x, weight)
        return stock(x)

    @staticmethod
    def backward(ctx, grad):
        refuse_second_derivative("rms_norm")
        x, weight = ctx.saved_tensors
        kind = torch.float32 if x.dtype in LOW_PRECISION else x.dtype
        unit, grad = x.to(kind), grad.to(kind)
        scale = torch.rsqrt(torch.linalg.vector_norm(unit, dim=-1, keepdim=True).square() / x.shape[-1] + ctx.eps)
        unit = unit * scale
        grad_w = None
        if ctx.needs_input_grad[1]:
            grad_w = (grad * unit).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
        if not ctx.needs_input_grad[0]:
            return None, grad_w, None, None, None
        pull = grad * (weight.to(kind) + ctx.offset if ctx.offset else weight.to(kind))
        inner = torch.einsum("...d,...d->...", pull, unit).unsqueeze(-1) / x.shape[-1]
        return pull.addcmul_(unit, inner, value=-1).mul_(scale).to(x.dtype), grad_w, None, None, None
