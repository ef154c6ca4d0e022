"""Overwriting rows in place: no second copy of the stored tensor, forward or backward."""

from __future__ import annotations

import torch
from torch import Tensor


def overwrite(stored: Tensor, fresh: Tensor, positions: Tensor, valid: Tensor, factor: Tensor | None = None) -> Tensor:
    """Write rows into a constant, in place; the gradient reaches the rows and nothing else.

    Nothing of the size of `stored` is kept or made. `stored` itself changes.

    Args:
        stored: (B, ..., L, D), no gradient.
        fresh: (B, ..., K, D).
        positions: (B, K) int64, where each row goes. Where it is not valid it must repeat the row's first position.
        valid: (B, K) bool; other rows are not written and get no gradient.
        factor: (B, K) that the rows' gradients are multiplied with; None: 1.

    Returns:
        (B, ..., L, D), the memory of `stored`.

    Example:
        >>> stored, fresh = torch.zeros(1, 3, 1), torch.ones(1, 1, 1, requires_grad=True)
        >>> out = overwrite(stored, fresh, torch.tensor([[2]]), torch.tensor([[True]]))
        >>> out.flatten().tolist(), torch.autograd.grad(out.sum(), fresh)[0].item()
        ([0.0, 0.0, 1.0], 1.0)
    """
    return _Overwrite.apply(fresh, stored, positions, valid, factor)


def take(rows: Tensor, positions: Tensor) -> Tensor:
    """Rows `positions` (B, K) of (B or 1, L, ...): (B, K, ...)."""
    batch = torch.arange(positions.shape[0], device=positions.device)[:, None]
    return rows[0][positions] if rows.shape[0] == 1 else rows[batch, positions]


class _Overwrite(torch.autograd.Function):
    @staticmethod
    def forward(ctx, fresh, stored, positions, valid, factor):
        ctx.save_for_backward(positions, valid if factor is None else torch.where(valid, factor, 0))
        if fresh.shape[-2]:
            # several rows may go to one place; they must bring the same values then
            rows = torch.where(_over(valid, fresh), fresh, fresh[..., :1, :])
            stored.scatter_(-2, _over(positions, fresh).expand_as(fresh), rows)
        return stored.detach()

    @staticmethod
    def backward(ctx, grad):
        positions, factor = ctx.saved_tensors
        shape = (*grad.shape[:-2], positions.shape[1], grad.shape[-1])
        index = _over(positions, grad).expand(shape)
        return grad.gather(-2, index).mul_(_over(factor, grad).to(grad.dtype)), None, None, None, None


def _over(per_row: Tensor, like: Tensor) -> Tensor:
    """(B, K) as (B, 1, ..., K, 1), to go with a tensor of the dimensions of `like`."""
    batch, count = per_row.shape
    return per_row.view(batch, *[1] * (like.dim() - 3), count, 1)
