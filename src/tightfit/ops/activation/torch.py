"""Activations with own backwards."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tightfit.ops import kernels
from tightfit.ops.autograd import first_gradient, refuse_second_derivative
from tightfit.ops.codec import Codec, Kept
from tightfit.ops.recompute import recompute
from tightfit.ops.source import attach

aten = torch.ops.aten
Function = Callable[[Tensor], Tensor]


class Slope:
    """An activation's derivative, and the function itself, by torch's own kernels.

    Args:
        kind: as `kind_of` names it.
    """

    def __init__(self, kind: str):
        silu = kind == "silu"
        self._value, self._slope = (aten.silu, aten.silu_backward) if silu else (aten.gelu, aten.gelu_backward)
        self._options = {} if silu else {"approximate": "tanh" if kind == "gelu_tanh" else "none"}

    def __call__(self, grad: Tensor, x: Tensor, memory: Tensor | None = None) -> Tensor:
        """grad * f'(x), in `memory`, which may be that of x, or in new memory."""
        if memory is None or memory.dtype != grad.dtype or x.dtype != grad.dtype:
            return self._slope(grad, x, **self._options)
        return self._slope.grad_input(grad, x, **self._options, grad_input=memory)

    def value(self, x: Tensor, memory: Tensor) -> Tensor:
        """f(x), in `memory`, which may be that of x."""
        return self._value.out(x, **self._options, out=memory)


def slope_of(function: Function) -> Slope | None:
    """The derivative of a function by torch's own kernel, or None where there is none.

    >>> slope_of(nn.ReLU()) is None
    True
    """
    kind = kind_of(function)
    return None if kind is None else Slope(kind)


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
    if not packed:
        return attach(out, (x,), function, rowwise=True)

    def again(*saved: Tensor) -> Tensor:
        made = kept.empty(saved)
        kept.each_part(saved, slope.value, made)
        return made

    return attach(out, packed, again)


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, function, slope, kept):
        ctx.slope, ctx.kept = slope, kept
        packed = kept.save(ctx, x)
        return function(x), *packed

    @staticmethod
    @first_gradient
    def backward(ctx, grad):
        refuse_second_derivative("activation")
        kept, saved = ctx.kept, ctx.saved_tensors
        if kept.codec is None:
            return ctx.slope(grad, saved[0]), None, None, None
        grad_x = kept.empty(saved)
        kept.each_part(saved, lambda x, pull, made: ctx.slope(pull, x, made), grad.to(grad_x.dtype), grad_x)
        return grad_x, None, None, None


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
        if not kept.alike:
            value, up = function(kept.one(saved, 0)), kept.one(saved, 1)
            return value.mul_(up) if value.shape == up.shape and value.dtype == up.dtype else value * up
        made = kept.empty(saved)
        kept.each_part(saved, lambda gate, up, rows: slope.value(gate, rows).mul_(up), made)
        return made

    return attach(out, packed or (gate, up), again, rowwise=not packed and gate.shape == up.shape)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, function, slope, kept, kind):
        ctx.function, ctx.slope, ctx.kept, ctx.kind = function, slope, kept, kind
        packed = kept.save(ctx, gate, up)
        return function(gate) * up, *packed

    @staticmethod
    @first_gradient
    def backward(ctx, grad):
        refuse_second_derivative("gated_activation")
        saved = ctx.saved_tensors  # once: a checkpoint unpacks only once
        if ctx.kind is not None and grad.dtype == ctx.kept.likes[0][1] and kernels.use(grad, *saved):
            from tightfit.ops.activation import triton

            gate, up = ctx.kept.again(saved)
            grads = triton.gated_backward(grad, gate, up, ctx.kind, overwrite=ctx.kept.codec is not None)
            return *grads, None, None, None, None
        if not ctx.kept.alike:
            pull = grad * ctx.kept.one(saved, 1)
            gate = ctx.kept.one(saved, 0)
            grad_gate = ctx.slope(pull, gate, pull)
            return grad_gate, ctx.function(gate).mul_(grad), None, None, None, None
        grad_gate, grad_up = ctx.kept.empty(saved), ctx.kept.empty(saved)

        def of_part(gate: Tensor, up: Tensor, pull: Tensor, of_gate: Tensor, of_up: Tensor) -> None:
            ctx.slope(up.mul_(pull), gate, of_gate)
            ctx.slope.value(gate, of_up).mul_(pull)

        ctx.kept.each_part(saved, of_part, grad.to(grad_up.dtype), grad_gate, grad_up)
        return grad_gate, grad_up, None, None, None, None
