"""Which tokens a step trains through: budgets, policies, and a random source that is one number."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from tightfit.core import hfmodel, processes

POLICIES = ("random", "labelled", "suffix", "block", "score", "bernoulli")
BLOCK = 16
"""Tokens of a block under policy="block"."""

SPREAD = 4.5
"""Standard deviations above its mean that a Bernoulli row has room for; what exceeds it (1 row in 300,000) is cut."""


@dataclasses.dataclass
class Selection:
    """Selected tokens of a batch.

    Attributes:
        positions: (B, K) int64, ascending; where not valid, the row's first one again.
        valid: (B, K) bool.
        probability: (B, K) of having been selected; of a policy that does not draw, the share of its row.
    """

    positions: Tensor
    valid: Tensor
    probability: Tensor


@dataclasses.dataclass
class Draw:
    """What a policy needs to know about a batch of B rows of L tokens.

    Attributes:
        real: (B, L) bool, no padding.
        keep: (B, L) bool, always selected.
        labelled: (B, L) bool, the token's target is not ignored; or None.
        scores: (B, L), or None.
    """

    real: Tensor
    keep: Tensor
    labelled: Tensor | None = None
    scores: Tensor | None = None


class Counter:
    """A stateless random source: numbers depend on the seed, the step and the place, on any device alike."""

    def __init__(self, seed: int, step: int = 0):
        self.seed, self.step = seed, step

    def uniform(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """(rows, columns) in [0, 1), the numbers of this step; the next call gives others.

        Each of several processes gets those of its own rows, as if one process had all rows, rank after rank.

        >>> same = [Counter(3).uniform(2, 2, torch.device("cpu")) for _ in range(2)]
        >>> torch.equal(*same)
        True
        """
        start = _mix_int(_mix_int(self.seed) + self.step)
        self.step += 1
        x = torch.arange(rows * columns, device=device) + ((start >> 1) + processes.rank() * rows * columns)
        for shift, factor in ((30, _signed(0xBF58476D1CE4E5B9)), (27, _signed(0x94D049BB133111EB))):
            x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
        x = x ^ ((x >> 31) & ((1 << 33) - 1))
        return ((x >> 40) & 0xFFFFFF).to(torch.float32).div_(1 << 24).view(rows, columns)


def _mix_int(x: int) -> int:
    wide = (1 << 64) - 1
    x = (x + 0x9E3779B97F4A7C15) & wide
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & wide
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & wide
    return (x ^ (x >> 31)) >> 2


def _signed(x: int) -> int:
    return x - (1 << 64)


def keep_set(real: Tensor, *, causal: bool) -> Tensor:
    """(B, L): the first real token of each row, of a decoder the last one too.

    >>> keep_set(torch.tensor([[False, True, True, True]]), causal=True).tolist()
    [[False, True, False, True]]
    """
    places = torch.arange(real.shape[1], device=real.device)
    count = real.shape[1]
    first = torch.where(real, places, count).amin(1, keepdim=True)
    keep = places == first
    if causal:
        last = torch.where(real, places, -1).amax(1, keepdim=True)
        keep = keep | (places == last)
    return keep


def most(ratio: float | None, count: int | None, length: int, keep: int) -> int:
    """Tokens a row of `length` tokens has selected: K, which no row of a batch of that length exceeds.

    >>> most(0.3, None, 10, 2), most(None, 16, 10, 2), most(0.01, None, 10, 2)
    (3, 10, 2)
    """
    wanted = count if count is not None else round(ratio * length)  # type: ignore[operator]
    return min(length, max(keep, wanted))


def select(
    draw: Draw, ratio: float | None, count: int | None, policy: str, random: Counter, least: int, extra: int = 0
) -> Selection:
    """Draw the tokens of a batch.

    Args:
        draw: the batch.
        ratio, count: of each row's real tokens; exactly one of them is not None.
        policy: one of `POLICIES`.
        random: where random numbers come from; policies that need none take none.
        least: size of the keep set.
        extra: tokens of each row that are kept besides, and do not count.
    """
    rows, length = draw.real.shape
    device = draw.real.device
    lengths = draw.real.sum(1)
    if policy == "bernoulli":
        return _bernoulli(draw, ratio, count, random, extra)
    size = most(ratio, count, length - extra, least) + extra
    own = lengths - extra
    wanted = (own * ratio).round().long() if ratio is not None else torch.full_like(lengths, count or 0)
    wanted = torch.minimum(wanted.clamp_min(least), own) + extra
    open_ones = draw.real
    places = torch.arange(length, device=device)
    if policy == "suffix":
        order = places.expand(rows, length).float()
    elif policy == "score":
        assert draw.scores is not None
        order = draw.scores.float()
    elif policy == "block":
        order = _in_blocks(draw.real & ~draw.keep, random)
    else:
        order = random.uniform(rows, length, device)
        if policy == "labelled" and draw.labelled is not None:
            open_ones = draw.real & (draw.labelled | draw.keep)
    order = order.masked_fill(draw.keep, torch.inf).masked_fill(~open_ones, -torch.inf)
    picked = order.topk(size, 1).indices
    valid = (torch.arange(size, device=device) < wanted[:, None]) & open_ones.gather(1, picked)
    kept, room = (draw.keep & open_ones).sum(1), open_ones.sum(1)
    if policy in ("random", "labelled", "block"):
        share = (wanted.minimum(room) - kept) / (room - kept).clamp_min(1)
    else:
        share = wanted / lengths.clamp_min(1)
    chance = torch.where(draw.keep, 1.0, share[:, None].clamp(1e-6, 1.0))
    return arranged(picked, valid, chance)


def _in_blocks(free: Tensor, random: Counter) -> Tensor:
    """(B, L) an order of the free tokens, block by block; each is equally likely to come among the first k.

    The row is a ring that is cut into blocks from a random place on, so no token is the end of a block more often.
    """
    rows, length = free.shape
    numbers = random.uniform(rows, 1 + -(-length // BLOCK), free.device).double()
    count = free.sum(1, keepdim=True).clamp_min(1)
    start = (numbers[:, :1] * count).long()
    place = (free.cumsum(1) - 1 + start).remainder(count)
    return numbers[:, 1:].gather(1, place // BLOCK) - place % BLOCK * 1e-9


def _bernoulli(draw: Draw, ratio: float | None, count: int | None, random: Counter, extra: int) -> Selection:
    rows, length = draw.real.shape
    device = draw.real.device
    lengths = draw.real.sum(1, keepdim=True)
    wanted = lengths * ratio if ratio is not None else torch.full_like(lengths, count or 0)
    chance = (wanted / lengths.clamp_min(1)).expand(rows, length)
    if draw.scores is not None:
        chance = in_proportion(chance, draw.scores, draw.real)
    chance = torch.where(draw.keep, 1.0, chance.clamp(1e-6, 1.0))
    mean = ratio * length if ratio is not None else min(count or 0, length)
    size = min(length, math.ceil(mean + SPREAD * math.sqrt(max(0.0, mean * (1 - mean / length)))) + 2)
    if draw.scores is not None:  # the chances may all be at either end
        size = min(length, math.ceil(mean + SPREAD * math.sqrt(mean)) + 2)
    size = min(length, size + extra)
    drawn = random.uniform(rows, length, device)
    taken = draw.real & (drawn < chance)
    order = torch.where(taken, drawn, 2.0).masked_fill(draw.keep & draw.real, -1.0)
    picked = order.topk(size, 1, largest=False).indices
    return arranged(picked, taken.gather(1, picked), chance)


def in_proportion(chance: Tensor, scores: Tensor, real: Tensor) -> Tensor:
    """(B, L) chances of the same mean as `chance`, in proportion to the scores."""
    mean = scores.where(real, 0.0).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp_min(1)
    return (chance * scores / mean).clamp(1e-6, 1.0)


def arranged(picked: Tensor, valid: Tensor, chance: Tensor) -> Selection:
    """A selection in ascending order, what is not valid behind it.

    Args:
        picked: (B, K) int64. valid: (B, K) bool.
        chance: (B, L) of each token having been selected.
    """
    length = chance.shape[1]
    positions, order = torch.where(valid, picked, length).sort(1)
    valid = valid.gather(1, order)
    first = torch.where(valid[:, :1], positions[:, :1], 0) if positions.shape[1] else positions
    positions = torch.where(valid, positions, first)
    return Selection(positions, valid, chance.gather(1, positions))


def given(positions: Tensor, real: Tensor, chance: Tensor) -> Selection:
    """The selection that the caller has made.

    Args:
        positions: (B, K), -1 for none.
        real: (B, L) bool.
        chance: (B, L).

    Raises:
        ValueError: another number of rows, positions out of range, twice in a row, or on padding.
    """
    rows, length = real.shape
    if positions.dim() != 2 or positions.shape[0] != rows or positions.is_floating_point():
        raise ValueError(
            f"token_positions: got shape {tuple(positions.shape)} of {positions.dtype}, accepted is ({rows}, K) int64"
        )
    positions = positions.to(real.device).long()
    valid = positions >= 0
    if hfmodel.has_values(positions) and positions.numel():
        low, high = int(positions.min()), int(positions.max())
        if low < -1 or high >= length:
            raise ValueError(f"token_positions: got {low if low < -1 else high}, accepted is -1 or [0, {length - 1}]")
        ordered = (
            torch.where(valid, positions, -1 - torch.arange(positions.shape[1], device=real.device)).sort(1).values
        )
        if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
            raise ValueError("token_positions: a row names a position twice; each must be named once")
        if bool((valid & ~real.gather(1, positions.clamp_min(0))).any()):
            raise ValueError(
                "token_positions: a position is padding (attention_mask is 0 there); name real tokens only"
            )
    return arranged(positions.clamp_min(0), valid, chance)


def check_scores(scores: Tensor, real: Tensor, *, positive: bool) -> Tensor:
    """The caller's scores (B, L), checked.

    Raises:
        ValueError: another shape, numbers that are not finite, or (`positive`) not above 0, on real tokens.
    """
    if scores.shape != real.shape:
        raise ValueError(f"token_scores: got shape {tuple(scores.shape)}, accepted is {tuple(real.shape)}")
    scores = scores.to(real.device)
    if hfmodel.has_values(scores):
        shown = scores.where(real, 1.0)
        if not bool(torch.isfinite(shown).all()):
            raise ValueError("token_scores: a score of a real token is not finite; give finite numbers")
        if positive and not bool((shown > 0).all()):
            raise ValueError(
                "token_scores: a score is 0 or below, so its token could never be drawn; give positive ones"
            )
    return scores
