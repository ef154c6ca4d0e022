"""What the fast paths must compute, written down plainly: dense layers with masks, one row after another."""

from __future__ import annotations

import torch
from torch import Tensor


def top_rows(q: Tensor, keys: Tensor, k: int) -> Tensor:
    """(M, r) bool: the k rows of largest score of each token, those above 0 only."""
    scores = q @ keys.t()
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    for token in range(len(scores)):
        chosen[token, scores[token].argsort(descending=True, stable=True)[:k]] = True
    return chosen & (scores > 0)


def top_rows_of_groups(q: Tensor, keys: Tensor, k: int, logits: Tensor, probe: int) -> Tensor:
    """The same, of the rows of each token's `probe` best groups; `logits` is (M, N)."""
    size = len(keys) // logits.shape[1]
    best = torch.zeros_like(logits, dtype=torch.bool)
    for token in range(len(logits)):
        best[token, logits[token].argsort(descending=True, stable=True)[:probe]] = True
    open_rows = best.repeat_interleave(size, dim=1)
    scores = (q @ keys.t()).masked_fill(~open_rows, -torch.inf)
    chosen = torch.zeros_like(open_rows)
    for token in range(len(scores)):
        chosen[token, scores[token].argsort(descending=True, stable=True)[:k]] = True
    return chosen & (scores > 0)


def capped(chosen: Tensor, scores: Tensor, cap: int) -> Tensor:
    """`chosen` without the rows beyond the `cap` ones of largest summed score."""
    mass = scores.where(chosen, 0.0).sum(0)
    wanted = chosen.any(0)
    kept = [i for i in mass.argsort(descending=True, stable=True).tolist() if wanted[i]][:cap]
    allowed = torch.zeros_like(wanted)
    allowed[kept] = True
    return chosen & allowed


def sparse_rows(
    h: Tensor, keys: Tensor, values: Tensor, chosen: Tensor, scale: float = 1.0, gate: Tensor | None = None
) -> Tensor:
    """(M, d): s * (ReLU(h K^T) * gate, where chosen) V; differentiable in h, keys, values and gate (M, r)."""
    weights = torch.relu(h @ keys.t()).where(chosen, 0.0)
    return scale * ((weights if gate is None else weights * gate) @ values)


def row_adamw(
    rows: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    touched: list[int],
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> None:
    """AdamW on the touched rows, each with its own step count; in place."""
    for i in touched:
        step[i] += 1
        rows[i] *= 1 - lr * weight_decay
        exp_avg[i] = betas[0] * exp_avg[i] + (1 - betas[0]) * grad[i]
        exp_avg_sq[i] = betas[1] * exp_avg_sq[i] + (1 - betas[1]) * grad[i] ** 2
        mean = exp_avg[i] / (1 - betas[0] ** int(step[i]))
        square = exp_avg_sq[i] / (1 - betas[1] ** int(step[i]))
        rows[i] -= lr * mean / (square.sqrt() + eps)
