"""The readable attention with dropout, for tests: plain autograd."""

from __future__ import annotations

import torch
from torch import Tensor


def dropout_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, noise: Tensor, scale: float) -> Tensor:
    """softmax(q k^T scale + mask) * noise, times v; q (B, H, L, D), noise (B, H, L, S) of 0 and 1 / (1 - p)."""
    scores = q @ k.transpose(-2, -1) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return (scores.softmax(-1) * noise) @ v
