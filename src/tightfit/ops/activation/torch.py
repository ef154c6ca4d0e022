"""Activations with own backwards."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tightfit.ops.autograd import refuse_second_derivative
from tightfit.ops.recompute import recompute
from tightfit.ops.source import attach

aten = torch.ops.aten
Function = Callable[[Tensor], Tensor]
Slope = Callable[[Tensor, Tensor], Tensor]


def slope_of(function: Function) -> Slope | None:
    """(grad, x) -> grad * f'(x) by torch's own kernel, or None where there is none for this function."""
    if isinstance(function, (nn.SiLU, nn.GELU)):
        tanh = getattr(function, "approximate", "none")
    elif type(function).__name__ in ("SiLUActivation", "GELUActivation", "GELUTanh"):
        tanh = "tanh" if type(function).__name__ == "GELUTanh" else "none"
        if getattr(function, "act", nn.functional.gelu) is not nn.functional.gelu and "GELU" in type(function).__name__:
            return None  # its own formula in plain torch
    else:
        return None
    if "SiLU" in type(function).__name__:
        return aten.silu_backward
    return lambda grad, x: aten.gelu_backward(grad, x, approximate=tanh)


def activation(x: Tensor, function: Function) -> Tensor:
    """f(x) bit for bit, of which only x is kept: the linear layer behind it rebuilds f(x).

    Args:
        function: pointwise and without parameters. SiLU and GELU have torch's own derivative; any other is run
            again in backward.

    Example:
        >>> x = torch.zeros(2, requires_grad=True)
        >>> activation(x, nn.SiLU()).sum().backward()
        >>> x.grad.tolist()
        [0.5, 0.5]
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function(x)
    slope = slope_of(function)
    if slope is None:
        return recompute(function, x)
    return attach(_Activation.apply(x, function, slope), (x,), function)


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, function, slope):
        ctx.slope = slope
        ctx.save_for_backward(x)
        return function(x)

    @staticmethod
    def backward(ctx, grad):
        refuse_second_derivative("activation")
        (x,) = ctx.saved_tensors
        return ctx.slope(grad, x), None, None


def gated_activation(gate: Tensor, up: Tensor, function: Function) -> Tensor:
    """f(gate) * up bit for bit (SwiGLU, GeGLU), of which gate and up are kept; stock keeps four tensors.

    Args:
        gate, up: (..., F).
        function: as for `activation`.

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
    slope = slope_of(function)
    if slope is None:
        return recompute(product, gate, up)
    return attach(_Gated.apply(gate, up, function, slope), (gate, up), product)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, function, slope):
        ctx.function, ctx.slope = function, slope
        ctx.save_for_backward(gate, up)
        return function(gate) * up

    @staticmethod
    def backward(ctx, grad):
        refuse_second_derivative("gated_activation")
        gate, up = ctx.saved_tensors
        grad_up = ctx.function(gate).mul_(grad)
        return ctx.slope(grad * up, gate), grad_up, None, None
