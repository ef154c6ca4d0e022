"""The part of a key's gradient that comes from its own query, taken back from what a fused attention gives."""

from __future__ import annotations

import torch
from torch import Tensor


def own_probability(query: Tensor, keys: Tensor, mask: Tensor | None, positions: Tensor, scale: float) -> Tensor:
    """How much each query attends to its own position: (B, H, K).

    Args:
        query: (B, H, K, D).
        keys: (B, H_kv, L, D), heads not repeated.
        mask: additive, broadcastable to (B, H, K, L), or None.
        positions: (B, K) of the queries among the keys.

    The scores exist for one element of the batch at a time.

    Example:
        >>> same = torch.ones(1, 1, 2, 4)
        >>> own_probability(same, same, None, torch.tensor([[0, 1]]), 1.0)
        tensor([[[0.5000, 0.5000]]])
    """
    batch, heads, count, _ = query.shape
    groups = heads // keys.shape[1]
    out = query.new_empty(batch, heads, count)
    with torch.no_grad():
        for b in range(batch):
            folded = query[b].reshape(keys.shape[1], groups * count, -1)
            scores = (folded @ keys[b].transpose(-2, -1) * scale).view(heads, count, -1)
            if mask is not None:
                scores = scores + mask[b if mask.shape[0] > 1 else 0]
            index = positions[b][None, :, None].expand(heads, count, 1)
            out[b] = scores.softmax(-1).gather(-1, index).squeeze(-1)
    return out


def own_key(
    out: Tensor, query: Tensor, key: Tensor, value: Tensor, probability: Tensor, factor: Tensor, scale: float
) -> Tensor:
    """Take from the gradients of key and value what came from their own query, beyond once.

    The keys' and values' gradients are taken to be multiplied with `factor` already (as `ops.overwrite` does it); this
    adds (1 - factor) times the part from their own query, so that only what other queries gave is multiplied.

    Args:
        out: (B, K, H, D_v), the attention's output.
        query: (B, H, K, D).
        key, value: (B, H_kv, K, D), of the same tokens.
        probability: (B, H, K) from `own_probability`.
        factor: (B, K).

    Returns:
        `out`, unchanged in value.
    """
    return _OwnKey.apply(out, key, value, query, probability, factor, scale)


class _OwnKey(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out, key, value, query, probability, factor, scale):
        ctx.scale = scale
        ctx.save_for_backward(out, value, query, probability, factor)
        return out.detach()

    @staticmethod
    def backward(ctx, grad):
        out, value, query, probability, factor = ctx.saved_tensors
        batch, heads, count, _ = query.shape
        kv_heads = value.shape[1]
        pull, out = grad.transpose(1, 2), out.transpose(1, 2)  # (B, H, K, D_v)
        share = probability * (1 - factor[:, None]).to(probability.dtype)
        values = value.repeat_interleave(heads // kv_heads, 1)
        slope = share * (pull * (values - out)).sum(-1) * ctx.scale

        def summed(per_head: Tensor) -> Tensor:
            return per_head.view(batch, kv_heads, heads // kv_heads, count, -1).sum(2)

        return grad, summed(slope[..., None] * query), summed(share[..., None] * pull), None, None, None, None
