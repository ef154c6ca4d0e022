"""Readable norms and their backwards, for tests."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = w x / sqrt(mean(x^2) + eps) over the last dimension."""
    return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def rms_norm_backward(x: Tensor, weight: Tensor, eps: float, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight."""
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    unit, pull = x * scale, grad * weight
    grad_x = scale * (pull - unit * (pull * unit).mean(-1, keepdim=True))
    return grad_x, (grad * unit).reshape(-1, x.shape[-1]).sum(0)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """y = w (x - mean) / sqrt(var + eps) + b over the last dimension."""
    centred = x - x.mean(-1, keepdim=True)
    return weight * centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) + bias
