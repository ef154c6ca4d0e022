"""The readable `linear`: forward and backward written out, for tests."""

from __future__ import annotations

from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + b for x (..., I), weight (O, I), bias (O,)."""
    y = x @ weight.t()
    return y if bias is None else y + bias


def linear_backward(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias from that of y, (..., O), over flattened rows."""
    rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    return (grads @ weight).view(x.shape), grads.t() @ rows, grads.sum(0)
