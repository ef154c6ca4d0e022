"""Gated activations and stepped derivatives in one pass each, where plain torch takes two to four.

Intermediate values are rounded to the tensors' type where plain torch stores them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tightfit.ops import kernels

BLOCK = 1024


def product(gate: Tensor, up: Tensor, kind: str, *, overwrite: bool = False) -> Tensor:
    """f(gate) * up, what torch gives but for last bits of the exponential; `overwrite` puts it in gate's memory.

    Args:
        kind: as `tightfit.ops.activation.torch.kind_of` names the function.
    """
    gate, up = gate.contiguous(), up.contiguous()
    out = gate if overwrite else torch.empty_like(gate)
    count = gate.numel()
    kernels.launch(_product, _grid(count), gate, gate, up, out, count, KIND=kind, BLOCK=BLOCK)
    return out


def gated_backward(
    grad: Tensor, gate: Tensor, up: Tensor, kind: str, *, overwrite: bool = False
) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up of f(gate) * up; `overwrite` puts them in the memory of gate and up."""
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    grad_gate, grad_up = (gate, up) if overwrite else (torch.empty_like(gate), torch.empty_like(up))
    count = gate.numel()
    kernels.launch(
        _gated_backward, _grid(count), gate, grad, gate, up, grad_gate, grad_up, count, KIND=kind, BLOCK=BLOCK
    )
    return grad_gate, grad_up


def step_codes(x: Tensor, thresholds: Sequence[float]) -> Tensor:
    """How many of the three thresholds each element passes, four elements in a byte."""
    flat, count = x.contiguous(), x.numel()
    packed = torch.empty(triton.cdiv(count, 4), dtype=torch.uint8, device=x.device)
    first, second, third = thresholds
    kernels.launch(
        _step_codes, _grid(len(packed)), x, flat, packed, count, FIRST=first, SECOND=second, THIRD=third, BLOCK=BLOCK
    )
    return packed


def stepped(packed: Tensor, grad: Tensor, levels: Sequence[float]) -> Tensor:
    """grad times the one of four levels that each element's code stands for."""
    grad = grad.contiguous()
    out = torch.empty_like(grad)
    a, b, c, d = levels
    kernels.launch(
        _stepped, _grid(grad.numel()), grad, packed, grad, out, grad.numel(), A=a, B=b, C=c, D=d, BLOCK=BLOCK
    )
    return out


def _grid(count: int) -> tuple[int]:
    return (triton.cdiv(count, BLOCK),)


@triton.jit
def _inner(x):
    """The argument of the logistic function in tanh's form of GELU: 1 + tanh(z) is twice that function of 2 z."""
    return 1.5957691216057308 * (x + 0.044715 * x * x * x)


@triton.jit
def _logistic(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _value(x, KIND: tl.constexpr):
    if KIND == "silu":
        return x / (1.0 + tl.exp(-x))
    elif KIND == "gelu":
        return x * 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        return x * _logistic(_inner(x))


@triton.jit
def _slope(x, KIND: tl.constexpr):
    if KIND == "silu":
        gate = _logistic(x)
        return gate * (1.0 + x * (1.0 - gate))
    elif KIND == "gelu":
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    else:
        gate = _logistic(_inner(x))
        return gate + x * gate * (1.0 - gate) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)


@triton.jit
def _product(gate, up, out, count, KIND: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    value = _value(tl.load(gate + at, mask=inside, other=0.0).to(tl.float32), KIND)
    value = value.to(out.dtype.element_ty).to(tl.float32)
    value = value * tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gated_backward(grad, gate, up, grad_gate, grad_up, count, KIND: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    kind = grad_gate.dtype.element_ty
    pull = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    value = _value(x, KIND).to(kind).to(tl.float32)
    tl.store(grad_up + at, (value * pull).to(kind), mask=inside)
    pull = (pull * other).to(kind).to(tl.float32)
    tl.store(grad_gate + at, (pull * _slope(x, KIND)).to(kind), mask=inside)


@triton.jit
def _step_codes(x, packed, count, FIRST: tl.constexpr, SECOND: tl.constexpr, THIRD: tl.constexpr, BLOCK: tl.constexpr):
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    place = tl.arange(0, 4)[None, :]
    at = byte[:, None] * 4 + place
    value = tl.load(x + at, mask=at < count, other=float("-inf")).to(tl.float32)
    code = (value > FIRST).to(tl.int32) + (value > SECOND).to(tl.int32) + (value > THIRD).to(tl.int32)
    tl.store(packed + byte, tl.sum(code << (2 * place), axis=1).to(tl.uint8), mask=byte * 4 < count)


@triton.jit
def _stepped(
    packed,
    grad,
    out,
    count,
    A: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    code = tl.load(packed + at // 4, mask=inside, other=0).to(tl.int32) >> (2 * (at % 4)).to(tl.int32) & 3
    level = tl.where(code < 2, tl.where(code == 0, A, B), tl.where(code == 2, C, D)).to(tl.float32)
    level = level.to(out.dtype.element_ty).to(tl.float32)
    value = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32) * level
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)
