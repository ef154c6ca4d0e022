"""The readable plan of row sampling, and what its variance must be; for tests."""

from __future__ import annotations

import math
from itertools import pairwise, permutations

import torch
from torch import Tensor


def inclusion(scores: Tensor, k: int) -> tuple[Tensor, list[int]]:
    """How probable each row is in the default mode, (n,) float64, and the rows that are certain by their score."""
    values, sure = _read(scores)
    pi = torch.zeros(len(values), dtype=torch.float64)
    if len(sure) > k:
        pi[sure] = k / len(sure)
        return pi, []
    k -= len(sure)
    ranked = sorted((i for i, s in enumerate(values) if s > 0 and i not in sure), key=lambda i: -values[i])
    k = min(k, len(ranked))
    winners = 0
    while winners < k and (k - winners) * values[ranked[winners]] >= math.fsum(values[i] for i in ranked[winners:]):
        winners += 1
    if len(ranked) == k:
        winners = k
    certain, rest = sure + ranked[:winners], ranked[winners:]
    pi[certain] = 1.0
    mass = math.fsum(values[i] for i in rest)
    for i in rest:
        pi[i] = (k - winners) * values[i] / mass
    return pi, certain


def paper_plan(scores: Tensor, k: int) -> tuple[list[int], Tensor]:
    """The paper's winners, and how probable each row is in one draw from the rest, (n,) float64.

    With P_c the mass of the c best rows, the number of winners is the c < k with the smallest (1 - P_c) / (k - c).
    Scores are finite and more than k of them above 0.
    """
    values = [float(s) for s in scores]
    ranked = sorted(range(len(values)), key=lambda i: -values[i])
    left = [math.fsum(values[i] for i in ranked[c:]) for c in range(k)]
    c = min(range(k), key=lambda c: left[c] / (k - c))
    q = torch.zeros(len(values), dtype=torch.float64)
    for i in ranked[c:]:
        q[i] = values[i] / left[c]
    return ranked[:c], q


def independent_variance(terms: Tensor, winners: list[int], q: Tensor, draws: int) -> float:
    """Mean squared error of the sum of `terms` (n, D): `winners` exact, `draws` independent rows from the others.

    With no winners and q = p it is plain sampling: (sum |f|^2 / p - |sum f|^2) / k.
    """
    total, second = torch.zeros_like(terms[0]), 0.0
    for i, f in enumerate(terms):
        if i not in winners and q[i] > 0:
            total += f
            second += float(f @ f) / float(q[i])
    return (second - float(total @ total)) / draws


def joint_inclusion(scores: Tensor, k: int) -> Tensor:
    """How probable each pair of rows is in the default mode, (n, n) float64, over all orders and all offsets.

    Exact: for one order the set drawn changes only where the offset passes the fraction of a running sum. For a
    handful of rows.
    """
    pi, winners = inclusion(scores, k)
    n = len(pi)
    rest = [i for i in range(n) if i not in winners and pi[i] > 0]
    seats = round(float(pi.sum())) - len(winners)
    joint, orders = torch.zeros(n, n, dtype=torch.float64), list(permutations(rest))
    for order in orders:
        reach, running = [], 0.0
        for i in order:
            running += float(pi[i])
            reach.append(running)
        cuts = sorted({0.0, 1.0, *(r % 1.0 for r in reach[:-1])})
        for low, high in pairwise(cuts):
            offset = (low + high) / 2
            drawn = [next(i for i, r in zip(order, reach) if r > offset + j) for j in range(seats)]
            for a in winners + drawn:
                for b in winners + drawn:
                    joint[a, b] += (high - low) / len(orders)
    return joint


def systematic_variance(terms: Tensor, scores: Tensor, k: int) -> float:
    """Mean squared error of the sum of `terms` (n, D) in the default mode, exact; for a handful of rows."""
    pi, _ = inclusion(scores, k)
    joint = joint_inclusion(scores, k)
    error = 0.0
    for i, f in enumerate(terms):
        for j, g in enumerate(terms):
            if pi[i] > 0 and pi[j] > 0:
                error += float((joint[i, j] / (pi[i] * pi[j]) - 1) * (f @ g))
    return error


def _read(scores: Tensor) -> tuple[list[float], list[int]]:
    values = [float(s) for s in scores]
    sure = [i for i, s in enumerate(values) if not math.isfinite(s)]
    values = [max(s, 0.0) if math.isfinite(s) else 0.0 for s in values]
    if not sure and not any(values):
        values = [1.0] * len(values)
    return values, sure
