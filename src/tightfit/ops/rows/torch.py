"""An unbiased weight gradient from k of n rows (WTA-CRS, arXiv 2305.15265).

The gradient of a weight is a sum over rows of outer products. The rows with the largest scores ("winners") are taken
for certain, the other slots are drawn from the rest with probability proportional to score, and every drawn row is
divided by the expected number of times it is drawn. Any scores give the right mean as long as no row that matters has
score 0; scores close to the norms of the outer products give a small variance. What is lost is precision, never the
mean: the estimate differs from the exact gradient by noise.

The paper draws the rest independently. Here the default draws it without replacement, systematically in random order:
equal slots are laid over the running sum of the scores, so no row is drawn twice, which lowers the variance.

No step looks at a value on the host: the number of winners is a tensor, and the shapes depend on n and k alone.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

MODES = ("pps", "wta", "crs")

# stands for a score that is no number: above every float32, and a sum of 1e100 of them is still finite
_CERTAIN = 1e200


class Sample(NamedTuple):
    """Which rows to keep, and by what to multiply their part of the sum.

    rows: (k,) int64. Winners first, by falling score, then the drawn rows: not sorted, because gathering in order is
        at most a twentieth faster and sorting costs that.
    weights: (k,) float32, or float64 where the scores were. 1 for winners, 1 / expected draws for the others, 0 for a
        slot without a row (which then names row 0).
    """

    rows: Tensor
    weights: Tensor


def kept_rows(n: int, budget: float, min_rows: int = 16) -> int:
    """How many of `n` rows the fraction `budget` keeps: rounded up, at least `min_rows`, at most `n`.

    Raises:
        ValueError: for a budget outside (0, 1], negative `n` or `min_rows` below 1.

    Example:
        >>> kept_rows(4096, 0.3), kept_rows(20, 0.3), kept_rows(8, 0.3)
        (1229, 16, 8)
    """
    if not 0 < budget <= 1:
        raise ValueError(f"budget is {budget}; give the fraction of rows to keep, above 0 and at most 1")
    if n < 0 or min_rows < 1:
        raise ValueError(f"n is {n} and min_rows is {min_rows}; n is at least 0 and min_rows at least 1")
    return min(n, max(min_rows, math.ceil(round(budget * n, 6))))  # 0.07 of 100 rows is 7, not 7.000000000000001


def row_norms(x: Tensor) -> Tensor:
    """The Euclidean length of each row of `x` (..., I), flattened to (n,); float32, or float64 for float64.

    A row with a NaN or an infinity has a length that is not finite, which `sample_rows` takes for certain; so has a row
    beyond 1e19, and one below 1e-22 has length 0 (squares leave float32).

    Raises:
        TypeError: for integers, booleans or complex numbers.

    Example:
        >>> row_norms(torch.tensor([[[3.0, 4.0], [0.0, 2.0]]]))
        tensor([5., 2.])
    """
    _require_real(x, "x")
    if x.dtype in (torch.float64, torch.bfloat16):
        # bfloat16 has the range of float32 and is summed in float32; rounding the length costs nothing but variance
        norms = torch.linalg.vector_norm(x, dim=-1)
    else:
        norms = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)
    return norms.reshape(-1) if x.dtype == torch.float64 else norms.reshape(-1).float()


def sample_rows(scores: Tensor, k: int, *, mode: str = "pps", generator: torch.Generator | None = None) -> Sample:
    """Choose `k` rows such that the weighted sum over them has the mean of the sum over all.

    `pps`: winners and a systematic sample of the rest; no row twice. `wta`: the paper's, winners and independent draws.
    `crs`: independent draws only, for comparison.

    Rows of score 0 are never drawn, unless all scores are 0: then all rows are equal. Where no more than `k` rows have
    a score, `pps` and `wta` take each of them with weight 1. A score that is not finite makes a certain winner; where
    there are more than `k` of these, `k` of them are drawn. Negative scores count as 0. `k >= n` gives every row once.

    Args:
        scores: (n,), any floating type.
        k: rows to keep; the sample has min(k, n) slots.
        mode: one of `MODES`.
        generator: of the device of `scores`; the default one otherwise.

    Raises:
        ValueError: for scores that are not one-dimensional, k below 1, an unknown mode.
        TypeError: for scores that are not floating-point.

    Example:
        >>> sample = sample_rows(torch.tensor([9.0, 0.0, 1.0, 1.0, 1.0]), 2)
        >>> sample.rows[0].item(), sample.weights.tolist()
        (0, [1.0, 3.0])

    Source: arXiv 2305.15265, section 3.2; the systematic draw is Madow's (1949). Deviations: where every live row fits
    in `k`, none is left to chance; winners stay exact and drawn rows keep their weights also where the paper's code
    has no winners, or winners with nearly all of the mass.
    """
    if scores.dim() != 1:
        raise ValueError(f"scores have shape {tuple(scores.shape)}; give one number per row, shape (n,)")
    _require_real(scores, "scores")
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; choose one of {', '.join(MODES)}")
    n, device = scores.shape[0], scores.device
    if k < 1 and n:
        raise ValueError(f"k is {k}; keep at least 1 row")
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    if k >= n:
        return Sample(torch.arange(n, device=device), torch.ones(n, dtype=dtype, device=device))

    mass = _mass(scores.detach())
    best, first = torch.topk(mass, k)
    seats = torch.arange(k, 0, -1, dtype=torch.float64, device=device)  # left at slot 0, 1, ...
    rest = mass.scatter_(0, first, 0.0)
    if mode == "crs":
        winners = best >= _CERTAIN
    else:
        # behind[c] is the mass without the c best, summed from its small end so that nothing cancels. A row that
        # would win but for rounding may win: winners are exact, whichever they are
        behind = best.flip(0).cumsum(0).flip(0).add_(rest.sum())
        winners = best * seats > behind.mul_(1 - 1e-12)
    # one seat is always drawn: where a single row is left for it, that row is certain and has weight 1
    open_seats = k - winners.sum().clamp(max=k - 1)
    won = seats > open_seats

    rest.scatter_(0, first, best.masked_fill(won, 0.0))
    if mode == "pps":
        order = torch.randperm(n, generator=generator, device=device)
        reach = rest.index_select(0, order).cumsum(0)
        at = open_seats + torch.rand((), dtype=torch.float64, generator=generator, device=device) - seats
    else:
        reach = rest.cumsum(0)
        at = torch.rand(k, dtype=torch.float64, generator=generator, device=device) * open_seats
    total = reach[-1]
    share = total / open_seats
    # rounding up to the total would go past the last row with a score
    at = at.mul_(share).clamp_(max=total * (1 - 2**-52))
    drawn = torch.searchsorted(reach, at, right=True).clamp_(max=n - 1)
    if mode == "pps":
        drawn = order.index_select(0, drawn)
    # with nothing left to draw from, 0 / 0 seats no row
    weights = (share / rest.index_select(0, drawn)).nan_to_num_(nan=0.0).masked_fill_(won, 1.0)
    return Sample(torch.where(won, first, drawn * (total > 0)), weights.to(dtype))


def weight_grad(rows_of_x: Tensor, sample: Sample, grad: Tensor, *, transposed: bool = False) -> Tensor:
    """The sampled estimate of `grad.T @ x`, in one product over the k rows kept.

    Keeps nothing. The weights are rounded to the type of `grad` as they are used: in bfloat16 each by up to 0.4 %.

    Args:
        rows_of_x: (k, I), `x[sample.rows]`.
        sample: what `sample_rows` gave for the n rows.
        grad: (n, O), of the type of `rows_of_x`.
        transposed: (I, O) instead of (O, I), for weights that are stored that way.

    Raises:
        ValueError: where the shapes do not belong together.

    Example:
        >>> x, grad = torch.randn(6, 3), torch.randn(6, 2)
        >>> sample = sample_rows(row_norms(x), 6)
        >>> torch.allclose(weight_grad(x[sample.rows], sample, grad), grad.T @ x, atol=1e-6)
        True
    """
    k = sample.rows.shape[0]
    if rows_of_x.dim() != 2 or grad.dim() != 2 or not rows_of_x.shape[0] == sample.weights.shape[0] == k <= len(grad):
        raise ValueError(
            f"rows_of_x has shape {tuple(rows_of_x.shape)} and grad {tuple(grad.shape)} for a sample of {k} rows; "
            f"give ({k}, I), the rows the sample names, and (n, O), the gradient of all n rows"
        )
    kept = weighted(grad, sample)
    return rows_of_x.t() @ kept if transposed else kept.t() @ rows_of_x


def weighted(grad: Tensor, sample: Sample) -> Tensor:
    """The rows of `grad` (n, O) that the sample names, times their weights; (k, O)."""
    return grad.index_select(0, sample.rows).mul_(sample.weights.to(grad.dtype)[:, None])


def _mass(scores: Tensor) -> Tensor:
    """Scores as float64 numbers >= 0, of which at least one is above 0; a new tensor."""
    if scores.dtype == torch.float64:
        # sums and products of the largest float64 would overflow
        finite = scores.isfinite()
        peak = scores.where(finite, 0.0).amax().clamp(min=torch.finfo(torch.float64).tiny)
        mass = (scores / peak).where(finite, _CERTAIN)
    else:
        mass = torch.nan_to_num(scores.double(), nan=_CERTAIN, posinf=_CERTAIN, neginf=_CERTAIN)
    mass = mass.clamp_(min=0.0)
    return mass.add_(mass.sum() == 0)


def _require_real(x: Tensor, name: str) -> None:
    if not x.is_floating_point():
        raise TypeError(f"{name} is of type {x.dtype}; give floating-point numbers")
