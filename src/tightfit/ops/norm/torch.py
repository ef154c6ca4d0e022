"""Norms with own backwards: the input is kept, and a row's statistics.

With a codec the normalised rows are kept in its code instead: the backward needs nothing else of the input but the
scale of each row, and the linear layers behind apply weight and bias again.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tightfit.ops import kernels
from tightfit.ops.autograd import autocast_dtype, first_gradient, refuse_second_derivative, save_beside
from tightfit.ops.codec import Codec
from tightfit.ops.source import Rebuild, attach, lasting

LOW_PRECISION = (torch.bfloat16, torch.float16)
WIDEST = 16384
"""Elements of a row that one program of a kernel can hold."""


def layer_norm(
    x: Tensor,
    shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    codec: Codec | None = None,
) -> Tensor:
    """`F.layer_norm`, bit for bit, whose output is rebuilt by the linear layers behind it.

    Keeps x and two numbers a row, as stock does; with a codec the code of the normalised rows and one number a row.

    Raises:
        RuntimeError: on double backward.

    Example:
        >>> x = torch.arange(4.0).view(1, 4).requires_grad_()
        >>> layer_norm(x, (4,), torch.ones(4), None, 0.0).tolist()[0][0] < -1.3
        True
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return F.layer_norm(x, shape, weight, bias, eps)
    held_weight, held_bias = lasting(weight), lasting(bias)
    if codec is None or len(shape) > 1 or not x.numel():
        out = _LayerNorm.apply(x, shape, weight, bias, eps)
        from_x = functools.partial(F.layer_norm, normalized_shape=shape, weight=held_weight, bias=held_bias, eps=eps)
        return attach(out, (x,), from_x, rowwise=len(shape) == 1)
    units = _Units(codec)
    out, *packed = _CodedLayerNorm.apply(x, shape, weight, bias, eps, units)

    def again(*kept: Tensor) -> Tensor:
        unit = units.ahead(kept)
        if held_weight is None:
            return unit if held_bias is None else unit + held_bias
        return unit * held_weight if held_bias is None else torch.addcmul(held_bias, unit, held_weight)

    return attach(out, packed, again)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shape, weight, bias, eps):
        wide, scale, shift = _as_autocast(x, weight, bias)
        out, mean, rstd = torch.native_layer_norm(wide, shape, scale, shift, eps)
        ctx.shape = shape
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        return out

    @staticmethod
    def backward(ctx, grad):
        refuse_second_derivative("layer_norm")
        x, mean, rstd, weight, bias = ctx.saved_tensors
        needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[2], ctx.needs_input_grad[3]]
        if _in_kernel(ctx.shape, x, grad, mean, rstd, weight, bias):
            from tightfit.ops.norm import triton

            grads = triton.backward(
                x,
                grad,
                weight,
                needs,
                like_bias=bias,
                shape=ctx.shape,
                dtype=x.dtype,
                mean=mean,
                scale=rstd,
                centred=True,
            )
            return grads[0], None, grads[1], grads[2], None
        return _layer_norm_backward(grad, x.to(grad.dtype), ctx.shape, mean, rstd, weight, bias, needs, x.dtype)


class _Units(Rebuild):
    """The normalised rows from their code, decoded once for the layers behind and the norm's own backward."""

    def __init__(self, codec: Codec):
        self.codec = codec
        super().__init__(codec.decode)

    def encode(self, unit: Tensor, ctx: Any) -> tuple[Tensor, ...]:
        self.shape, self.dtype = unit.shape, unit.dtype
        if any(ctx.needs_input_grad):
            self.add_user()
        return self.codec.encode(unit)

    def make(self, kept: Sequence[Tensor], grad: Tensor | None) -> Tensor:
        return self.codec.decode(kept, self.shape, self.dtype)


class _CodedLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shape, weight, bias, eps, units):
        wide, scale, shift = _as_autocast(x, weight, bias)
        unit, _, rstd = torch.native_layer_norm(wide, shape, None, None, eps)
        packed = units.encode(unit, ctx)
        out = unit if weight is None and bias is None else torch.native_layer_norm(wide, shape, scale, shift, eps)[0]
        ctx.shape, ctx.units, ctx.input_dtype = shape, units, x.dtype
        save_beside(ctx, packed, rstd, weight, bias, *packed)
        return out, *packed

    @staticmethod
    @first_gradient
    def backward(ctx, grad):
        refuse_second_derivative("layer_norm")
        rstd, weight, bias, *packed = ctx.saved_tensors
        needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[2], ctx.needs_input_grad[3]]
        unit = ctx.units(packed)
        if _in_kernel(ctx.shape, unit, grad, rstd, weight, bias):
            from tightfit.ops.norm import triton

            grads = triton.backward(
                unit,
                grad,
                weight,
                needs,
                like_bias=bias,
                shape=ctx.shape,
                dtype=ctx.input_dtype,
                scale=rstd,
                centred=True,
                normalised=True,
            )
            return grads[0], None, grads[1], grads[2], None, None
        # as the norm of rows of mean 0 and scale 1; the scale of the true rows comes last
        mean, one = torch.zeros_like(rstd), torch.ones_like(rstd)
        grads = _layer_norm_backward(grad, unit, ctx.shape, mean, one, weight, bias, needs, ctx.input_dtype, scale=rstd)
        return *grads, None


def _as_autocast(x: Tensor, *params: Tensor | None) -> list:
    """The tensors as autocast hands them to a layer norm: in float32, but on a CPU as they are."""
    kind = x.device.type
    if kind == "cpu" or autocast_dtype(kind) is None:
        return [x, *params]
    return [t.float() if t is not None and t.dtype in LOW_PRECISION else t for t in (x, *params)]


def _layer_norm_backward(grad, x, shape, mean, rstd, weight, bias, needs, dtype, scale=None) -> tuple:
    """Gradients for x (in `dtype`, times `scale`), the shape, weight, bias and eps, by torch's own kernel.

    Where autocast widened the norm its parameters are narrower than x, and their gradients must be as they are.
    """
    wide = [t if t is None or x.dtype in LOW_PRECISION else t.to(x.dtype) for t in (weight, bias)]
    if any(t is not None and t.dtype == torch.float32 for t in wide):
        mean, rstd = mean.float(), rstd.float()
    grad_x, grad_w, grad_b = torch.ops.aten.native_layer_norm_backward(
        grad.contiguous(), x, shape, mean, rstd, *wide, needs
    )
    if grad_x is not None:
        grad_x = (grad_x if scale is None else grad_x.mul_(scale)).to(dtype)
    grad_w, grad_b = (None if g is None else g.to(p.dtype) for g, p in ((grad_w, weight), (grad_b, bias)))
    return grad_x, None, grad_w, grad_b, None


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    stock: Callable[[Tensor], Tensor],
    *,
    offset: float = 0.0,
    codec: Codec | None = None,
    rebuild: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """A model's own root-mean-square norm, of which only the input is kept.

    Args:
        x: (..., d).
        weight: (d,).
        stock: the model's forward, which computes `(offset + weight) * x / sqrt(mean(x^2) + eps)`; its output is
            returned bit for bit.
        offset: 1 where the model stores the weight around zero (Gemma).
        codec: keeps the normalised rows in its code instead of x.
        rebuild: makes the output again from the weight, or a copy of it, and x: the model may be without its weight
            when backward needs the output, or have another one. None: `stock` does that.

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
    held: Tensor = lasting(weight)  # type: ignore[assignment]
    if codec is None or not x.numel():
        from_x = stock if rebuild is None else functools.partial(rebuild, held)
        return attach(_RMSNorm.apply(x, weight, eps, stock, offset), (x,), from_x, rowwise=True)
    units = _Units(codec)
    out, *packed = _CodedRMSNorm.apply(x, weight, eps, stock, offset, units)
    dtype, kind = out.dtype, _compute_dtype(x)

    def again(*kept: Tensor) -> Tensor:
        return (units.ahead(kept) * _factor(held, offset, kind)).to(dtype)

    return attach(out, packed, again)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype in LOW_PRECISION else x.dtype


def _in_kernel(shape: tuple[int, ...], *tensors: Tensor | None) -> bool:
    return math.prod(shape) <= WIDEST and kernels.use(*tensors, dtypes=kernels.HALVES)


def _factor(weight: Tensor, offset: float, kind: torch.dtype) -> Tensor:
    return weight.to(kind) + offset if offset else weight.to(kind)


def _unit(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x / rms, 1 / rms) in the dtype they are computed in."""
    wide = x.to(_compute_dtype(x))
    scale = torch.rsqrt(torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square() / x.shape[-1] + eps)
    return wide * scale, scale


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
        if _in_kernel(weight.shape, x, grad, weight):
            from tightfit.ops.norm import triton

            needs, offset = ctx.needs_input_grad[:2], ctx.offset
            grads = triton.backward(
                x, grad, weight, (*needs, False), shape=weight.shape, dtype=x.dtype, eps=ctx.eps, offset=offset
            )
            return grads[0], grads[1], None, None, None
        unit, scale = _unit(x, ctx.eps)
        return *_rms_backward(ctx, grad, unit, scale, weight, x.dtype), None, None, None


class _CodedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, stock, offset, units):
        unit, scale = _unit(x, eps)
        packed = units.encode(unit, ctx)
        ctx.offset, ctx.units, ctx.input_dtype = offset, units, x.dtype
        save_beside(ctx, packed, scale, weight, *packed)
        del unit
        return stock(x), *packed

    @staticmethod
    @first_gradient
    def backward(ctx, grad):
        refuse_second_derivative("rms_norm")
        scale, weight, *packed = ctx.saved_tensors
        unit = ctx.units(packed)
        if _in_kernel(weight.shape, unit, grad, scale, weight):
            from tightfit.ops.norm import triton

            grads = triton.backward(
                unit,
                grad,
                weight,
                (*ctx.needs_input_grad[:2], False),
                shape=weight.shape,
                dtype=ctx.input_dtype,
                scale=scale,
                offset=ctx.offset,
                normalised=True,
            )
            return grads[0], grads[1], None, None, None, None
        return *_rms_backward(ctx, grad, unit, scale, weight, ctx.input_dtype), None, None, None, None


def _rms_backward(ctx, grad: Tensor, unit: Tensor, scale: Tensor, weight: Tensor, dtype: torch.dtype):
    """(gradient of x, gradient of the weight) from the normalised rows and their scale."""
    grad, grad_w = grad.to(unit.dtype), None
    if ctx.needs_input_grad[1]:
        grad_w = (grad * unit).reshape(-1, unit.shape[-1]).sum(0).to(weight.dtype)
    if not ctx.needs_input_grad[0]:
        return None, grad_w
    pull = grad * _factor(weight, ctx.offset, unit.dtype)
    inner = torch.einsum("...d,...d->...", pull, unit).unsqueeze(-1) / unit.shape[-1]
    return pull.addcmul_(unit, inner, value=-1).mul_(scale).to(dtype), grad_w
