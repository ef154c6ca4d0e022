"""The readable form, for tests: the scores of own and other keys apart, plain autograd."""

from __future__ import annotations

import torch
from torch import Tensor


def scaled_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, factor: Tensor, scale: float
) -> Tensor:
    """Attention of L queries to L keys, all (B, H, L, D); where query and key are of different tokens, the gradient
    that the key and the value receive is multiplied with the key's factor (B, L). Returns (B, L, H, D).
    """

    def others(t: Tensor) -> Tensor:
        return t.detach() + factor[:, None, :, None] * (t - t.detach())

    own = torch.eye(query.shape[2], dtype=torch.bool)
    scores = torch.where(own, query @ key.transpose(-2, -1), query @ others(key).transpose(-2, -1)) * scale
    weights = (scores if mask is None else scores + mask).softmax(-1)
    out = torch.where(own, weights, 0) @ value + torch.where(own, 0, weights) @ others(value)
    return out.transpose(1, 2)
