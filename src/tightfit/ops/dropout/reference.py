"""The readable dropout, for tests."""

from __future__ import annotations

from torch import Tensor


def dropout(x: Tensor, kept: Tensor, p: float) -> Tensor:
    """x / (1 - p) where the boolean `kept` is set, else 0."""
    return x * kept.to(x.dtype).div_(1 - p)
