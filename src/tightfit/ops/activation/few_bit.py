"""Activations of which two bits an element are kept: on which of four levels the derivative is."""

from __future__ import annotations

import torch
from torch import Tensor

from tightfit.ops import kernels
from tightfit.ops.activation.torch import Function
from tightfit.ops.autograd import first_gradient, refuse_second_derivative, save_beside

STEPS = {
    "gelu": ((-3.18588, -0.04922), (-0.00118, 1.09796), (3.19083, -0.04874)),
    "silu": ((-6.30505, -0.04060), (-0.00087, 1.08093), (6.32582, -0.04032)),
}
"""Where the stepped derivative changes, and by how much; it starts at 0."""


def few_bit_activation(x: Tensor, function: Function, kind: str) -> Tensor:
    """f(x) bit for bit, keeping a quarter of a byte an element; the gradient takes the derivative of a step function.

    Nothing rebuilds f(x) from that, so a linear layer behind keeps its input itself if its weight takes a gradient:
    meant for frozen layers, as under adapters elsewhere. Where x is NaN so is f(x), but the derivative is 0.

    Args:
        x: floating point, any shape.
        function: what is computed, pointwise.
        kind: "gelu" (also its tanh form) or "silu", whose derivative is approximated.

    Raises:
        ValueError: another kind.
        TypeError: x is not floating point.
        RuntimeError: on double backward.

    Example:
        >>> x = torch.tensor([-8.0, -1.0, 1.0, 8.0], requires_grad=True)
        >>> few_bit_activation(x, torch.nn.GELU(), "gelu").sum().backward()
        >>> [round(slope, 4) for slope in x.grad.tolist()]
        [0.0, -0.0492, 1.0487, 1.0]

    Source: arXiv 2406.16282, section 4 (three ReLUs in place of the function, in backward only).
    """
    if kind not in STEPS:
        raise ValueError(
            f"few_bit_activation(kind=...): got {kind!r}, accepted is one of {', '.join(map(repr, STEPS))}"
        )
    if not x.is_floating_point():
        raise TypeError(f"few_bit_activation: the input is {x.dtype}, accepted is floating point")
    if not (torch.is_grad_enabled() and x.requires_grad) or torch.compiler.is_compiling():
        return function(x)
    return _FewBit.apply(x, function, kind)[0]


def levels(kind: str) -> list[float]:
    """The four values of the stepped derivative.

    >>> [round(level, 5) for level in levels("silu")]
    [0.0, -0.0406, 1.04033, 1.00001]
    """
    found = [0.0]
    for _, increment in STEPS[kind]:
        found.append(found[-1] + increment)
    return found


class _FewBit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, function, kind):
        if kernels.use(x, dtypes=kernels.HALVES):
            from tightfit.ops.activation import triton

            packed = triton.step_codes(x, [threshold for threshold, _ in STEPS[kind]])
        else:
            packed = pack_codes(sum((x > threshold).to(torch.uint8) for threshold, _ in STEPS[kind]))
        ctx.kind, ctx.dtype = kind, x.dtype
        save_beside(ctx, [packed], packed)
        return function(x), packed

    @staticmethod
    @first_gradient
    def backward(ctx, grad):
        refuse_second_derivative("few_bit_activation")
        (packed,) = ctx.saved_tensors
        if kernels.use(packed, grad) and grad.dtype in kernels.HALVES:
            from tightfit.ops.activation import triton

            return triton.stepped(packed, grad, levels(ctx.kind)).to(ctx.dtype), None, None
        slope = unpack_codes(packed, grad.numel(), torch.tensor(levels(ctx.kind), dtype=grad.dtype, device=grad.device))
        return slope.view(grad.shape).mul_(grad).to(ctx.dtype), None, None


def pack_codes(codes: Tensor) -> Tensor:
    """Numbers 0 to 3 as uint8, any shape, four in a byte; the last byte is filled up with 0."""
    flat = codes.reshape(-1)
    if flat.numel() % 4:
        flat = torch.cat([flat, flat.new_zeros(-flat.numel() % 4)])
    a, b, c, d = flat.view(-1, 4).unbind(1)
    return a | b << 2 | c << 4 | d << 6


def unpack_codes(packed: Tensor, count: int, values: Tensor) -> Tensor:
    """The value that each of the first `count` codes stands for; `values` are four."""
    # made anew each time, as in `tightfit.ops.bits`
    codes = torch.arange(256, device=packed.device).unsqueeze(1) >> torch.arange(0, 8, 2, device=packed.device) & 3
    return values[codes].index_select(0, packed.int()).view(-1)[:count]
