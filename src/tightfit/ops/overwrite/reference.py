"""The readable overwrite, for tests: plain autograd, one row at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def overwrite(stored: Tensor, fresh: Tensor, positions: Tensor, valid: Tensor, factor: Tensor | None = None) -> Tensor:
    """A copy of `stored` (B, ..., L, D) whose rows `positions` (B, K) are those of `fresh` (B, ..., K, D)."""
    out = stored.detach().clone()
    for b in range(positions.shape[0]):
        for i in range(positions.shape[1]):
            if valid[b, i]:
                row = fresh[b, ..., i, :]
                if factor is not None:
                    row = row.detach() + factor[b, i] * (row - row.detach())
                places = torch.arange(out.shape[-2]) == positions[b, i]
                out = torch.cat(
                    [out[:b], torch.where(places[:, None], row.unsqueeze(-2), out[b]).unsqueeze(0), out[b + 1 :]]
                )
    return out
