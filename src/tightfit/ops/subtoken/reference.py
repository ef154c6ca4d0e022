"""Sub-token projections written out, with the whole rank-one estimate of the input."""

from __future__ import annotations

import torch
from torch import Tensor


def sub_tokens(x: Tensor, groups: int) -> Tensor:
    """x (..., I) as (n, groups, M) with M = ceil(I / groups), zeros behind the last channel."""
    rows = x.reshape(-1, x.shape[-1])
    size = -(-rows.shape[1] // groups)
    padded = torch.zeros(rows.shape[0], groups * size, dtype=x.dtype)
    padded[:, : rows.shape[1]] = rows
    return padded.view(-1, groups, size)


def estimate(x: Tensor, direction: Tensor, groups: int, scale: float = 1.0) -> Tensor:
    """x_hat = scale (z . v) v per sub-token z, in the shape of x."""
    z = sub_tokens(x, groups)
    kept = torch.einsum("ngm,m->ng", z, direction)
    return (scale * kept[:, :, None] * direction).flatten(1)[:, : x.shape[-1]].reshape(x.shape)


def weight_grad(x: Tensor, grad: Tensor, direction: Tensor, groups: int, scale: float = 1.0) -> Tensor:
    """grad^T x_hat, (O, I)."""
    return grad.reshape(-1, grad.shape[-1]).t() @ estimate(x, direction, groups, scale).reshape(-1, x.shape[-1])


def average_direction(x: Tensor, groups: int) -> Tensor:
    """The mean sub-token, of length 1; all components equal where it vanishes or is no number."""
    mean = sub_tokens(x, groups).mean((0, 1))
    norm = mean.norm()
    if not torch.isfinite(norm) or norm < 1e-12:
        return torch.full_like(mean, mean.numel() ** -0.5)
    return mean / norm
