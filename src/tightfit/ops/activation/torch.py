"""Activations with own backwards."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tightfit.ops import kernels
from tightfit.ops.autograd import refuse_second_derivative
from tightfit.ops.codec import Codec, Kept
from tightfit.ops.recompute import recompute
from tightfit.ops.source import attach

aten = torch.ops.aten
Function = Callable[[Tensor], Tensor]
Slope = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def slope_of(function: Function) -> Slope | None:
    """(grad, x, memory) -> grad * f'(x) by torch's own kernel, or None where there is none for this function.

    The result goes into `memory`, which may be that of x, or into new memory where that is None.

    >>> slope_of(nn.ReLU()) is None
    True
    """
    kind = kind_of(function)
    if kind is None:
        return None
    kernel = aten.silu_backward if kind == "silu" else aten.gelu_backward
    options = {} if kind == "silu" else {"approximate": "tanh" if kind == "gelu_tanh" else "none"}

    def slope(grad: Tensor, x: Tensor, memory: Tensor | None = None) -> Tensor:
        if memory is None or memory.dtype != grad.dtype or x.dtype != grad.dtype:
            return kernel(grad, x, **options)
        return kernel.grad_input(grad, x, **options, grad_input=memory)

    return slope


def kind_of(function: Function) -> str | None:
    """ "silu", "gelu" or "gelu_tanh" where it is one of these as torch computes it, else None.

    >>> kind_of(nn.GELU(approximate="tanh")), kind_of(nn.ReLU())
    ('gelu_tanh', None)
    """
    # other packages have classes of these names too, which compute other things
    names = [cls.__name__ for cls in type(function).__mro__ if cls.__module__ == "transformers.activations"]
    if isinstance(function, nn.SiLU) or "SiLUActivation" in names:
        return "silu"
    if isinstance(function, nn.GELU):
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(function.approximate)
    if "GELUActivation" in names and function.act is nn.functional.gelu:  # type: ignore[attr-defined]
        return "gelu"
    return None


def activation(x: Tensor, function: Function, slope: Slope | None = None, *, codec: Codec | None = None) -> Tensor:
    """f(x) bit for bit, of which only x is kept, or its code: the linear layer behind it rebuilds f(x).

    Args:
        function: pointwise and without parameters.
        slope: its derivative, `slope_of(function)`; without one the function is run again in backward.
        codec: keeps x in its code.

    Example:
        >>> x = torch.zeros(2, requires_grad=True)
        >>> activation(x, nn.SiLU(), slope_of(nn.SiLU())).sum().backward()
        >>> x.grad.tolist()
        [0.5, 0.5]
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function(x)
    if slope is None:
        return recompute(function, x, codec=codec)
    kept = Kept(codec, x)
    out, *packed = _Activation.apply(x, function, slope, kept)
    return attach(out, packed or (x,), lambda *saved: function(*kept.again(saved)), rowwise=not packed)


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, function, slope, kept):
        ctx.slope, ctx.kept = slope, kept
        packed = kept.save(ctx, x)
        return function(x), *packed

    @staticmethod
    def backward(ctx, grad, *_):
        refuse_second_derivative("activation")
        (x,) = ctx.kept.again(ctx.saved_tensors)
        return ctx.slope(grad, x, x if ctx.kept.codec is not None else None), None, None, None


def gated_activation(
    gate: Tensor, up: Tensor, function: Function, slope: Slope | None = None, *, codec: Codec | None = None
) -> Tensor:
    """f(gate) * up bit for bit (SwiGLU, GeGLU), of which gate and up are kept; stock keeps four tensors.

    Args:
        gate, up: (..., F).
        function, slope, codec: as for `activation`.

    Example:
        >>> gate, up = torch.zeros(2, requires_grad=True), torch.ones(2, requires_grad=True)
        >>> gated_activation(gate, up, nn.SiLU()).sum().backward()
        >>> gate.grad.tolist(), up.grad.tolist()
        ([0.5, 0.5], [0.0, 0.0])
    """

    def product(gate: Tensor, up: Tensor) -> Tensor:
        return function(gate) * up

    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return product(gate, up)
    if slope is None:
        return recompute(product, gate, up, codec=codec)
    kept = Kept(codec, gate, up)
    alike = gate.shape == up.shape and gate.dtype == up.dtype and gate.dtype in kernels.HALVES
    kind = kind_of(function) if alike else None
    out, *packed = _Gated.apply(gate, up, function, slope, kept, kind)

    def again(*saved: Tensor) -> Tensor:
        if kind is not None and kernels.use(*saved):
            from tightfit.ops.activation import triton

            gate, up = kept.again(saved)
            return triton.product(gate, up, kind, overwrite=codec is not None)
        gate = kept.one(saved, 0)
        value = function(gate)
        if value is gate:
            return value * kept.one(saved, 1)
        del gate
        return value.mul_(kept.one(saved, 1))

    return attach(out, packed or (gate, up), again, rowwise=not packed and gate.shape == up.shape)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, function, slope, kept, kind):
        ctx.function, ctx.slope, ctx.kept, ctx.kind = function, slope, kept, kind
        packed = kept.save(ctx, gate, up)
        return function(gate) * up, *packed

    @staticmethod
    def backward(ctx, grad, *_):
        refuse_second_derivative("gated_activation")
        saved = ctx.saved_tensors  # once: a checkpoint unpacks only once
        if ctx.kind is not None and grad.dtype == ctx.kept.likes[0][1] and kernels.use(grad, *saved):
            from tightfit.ops.activation import triton

            gate, up = ctx.kept.again(saved)
            grads = triton.gated_backward(grad, gate, up, ctx.kind, overwrite=ctx.kept.codec is not None)
            return *grads, None, None, None, None
        pull = grad * ctx.kept.one(saved, 1)
        gate = ctx.kept.one(saved, 0)
        grad_gate = ctx.slope(pull, gate, pull)
        return grad_gate, ctx.function(gate).mul_(grad), None, None, None, None
