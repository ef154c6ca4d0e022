"""Which rows each token uses and which of them become resident: on the host, without autograd.

All scratch is taken from a `Workspace`, so selecting asks torch's allocator for nothing.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
from torch import Tensor

BLOCK_BYTES = 2**24
"""Scores are made in blocks of about this size."""


class Workspace:
    """Named scratch memory that is used again and again; outside of torch's allocator."""

    def __init__(self) -> None:
        self._memory: dict[str, np.ndarray] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor; it is valid until the same name is taken again.

        >>> Workspace().take("scores", (2, 3), torch.float32).shape
        torch.Size([2, 3])
        """
        size = math.prod(shape) * dtype.itemsize
        memory = self._memory.get(name)
        if memory is None or memory.nbytes < size:
            memory = self._memory[name] = np.empty(max(size, 1), dtype=np.uint8)
        if size == 0:
            return torch.empty(shape, dtype=dtype)
        return torch.from_numpy(memory[:size]).view(dtype).view(shape)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(memory.nbytes for memory in self._memory.values())

    def __deepcopy__(self, memo):
        return Workspace()


def top_rows(q: Tensor, keys: Tensor, k: int, work: Workspace) -> tuple[Tensor, Tensor]:
    """(M, k) row numbers and scores of the k rows of largest score of each token, in no order.

    Args:
        q: (M, d) on the host.
        keys: (r, d) on the host, floating point of any width; scores are made in q's dtype.

    Example:
        >>> rows, scores = top_rows(torch.tensor([[2.0, 1.0]]), torch.eye(2), 1, Workspace())
        >>> rows.tolist(), scores.tolist()
        ([[0]], [[2.0]])
    """
    tokens, count = q.shape[0], keys.shape[0]
    block = min(count, max(k, BLOCK_BYTES // (max(1, tokens) * q.element_size())))
    best = work.take("best", (tokens, 2 * k), q.dtype)
    rows = work.take("rows", (tokens, 2 * k), torch.int64)
    held = 0
    for start in range(0, count, block):
        part = keys[start : start + block]
        scores = work.take("scores", (tokens, part.shape[0]), q.dtype)
        torch.mm(q, _in_dtype(part, q.dtype, work).t(), out=scores)
        taken = min(k, part.shape[0])
        values = work.take("values", (tokens, taken), q.dtype)
        places = work.take("places", (tokens, taken), torch.int64)
        torch.topk(scores, taken, dim=1, sorted=False, out=(values, places))
        best[:, held : held + taken] = values
        rows[:, held : held + taken] = places.add_(start)
        held += taken
        if held > k:
            values = work.take("values", (tokens, k), q.dtype)
            places = work.take("places", (tokens, k), torch.int64)
            found = work.take("found", (tokens, k), torch.int64)
            torch.topk(best[:, :held], k, dim=1, sorted=False, out=(values, places))
            torch.gather(rows[:, :held], 1, places, out=found)
            best[:, :k], rows[:, :k], held = values, found, k
    return rows[:, :held], best[:, :held]


def group_scores(q: Tensor, router: Tensor, work: Workspace) -> Tensor:
    """(M, N): how well each group's direction fits each token."""
    logits = work.take("logits", (q.shape[0], router.shape[0]), q.dtype)
    return torch.mm(q, _in_dtype(router, q.dtype, work).t(), out=logits)


def top_rows_of_groups(
    q: Tensor, keys: Tensor, k: int, logits: Tensor, probe: int, work: Workspace
) -> tuple[Tensor, Tensor]:
    """As `top_rows`, of the rows of each token's `probe` groups of largest logit only; groups are equal runs of rows.

    Costs probe / N of the products.
    """
    tokens, groups = logits.shape
    size = keys.shape[0] // groups
    picked = work.take("group values", (tokens, probe), logits.dtype)
    chosen = work.take("groups", (tokens, probe), torch.int64)
    torch.topk(logits, probe, dim=1, sorted=False, out=(picked, chosen))
    flat = chosen.numpy().reshape(-1)
    order = np.argsort(flat, kind="stable")
    ends = np.searchsorted(flat[order], np.arange(groups + 1))
    scores = work.take("scores", (tokens * probe, size), q.dtype)
    for group in range(groups):
        pairs = order[ends[group] : ends[group + 1]]
        if len(pairs) == 0:
            continue
        own = torch.index_select(
            q, 0, torch.from_numpy(pairs // probe), out=work.take("tokens", (len(pairs), q.shape[1]), q.dtype)
        )
        part = _in_dtype(keys[group * size : (group + 1) * size], q.dtype, work)
        found = torch.mm(own, part.t(), out=work.take("of group", (len(pairs), size), q.dtype))
        scores.index_copy_(0, torch.from_numpy(pairs), found)
    values = work.take("values", (tokens, k), q.dtype)
    places = work.take("places", (tokens, k), torch.int64)
    torch.topk(scores.view(tokens, probe * size), k, dim=1, sorted=False, out=(values, places))
    local = places.numpy()
    rows = work.take("rows", (tokens, k), torch.int64)
    rows.numpy()[:] = np.take_along_axis(chosen.numpy(), local // size, axis=1) * size + local % size
    return rows, values


@dataclasses.dataclass
class Resident:
    """The rows that a batch of tokens brings to the device.

    Attributes:
        rows: (n,) their numbers, ascending.
        slots: (n,) where each stands in the slot.
        places: (M, k) int32: the slot place of each token's rows; -1 where it has none.
        wanted: how many rows tokens asked for.
        mass, dropped: sum of the positive scores, and the share of it that the cap dropped.
    """

    rows: np.ndarray
    slots: np.ndarray
    places: np.ndarray
    wanted: int
    mass: float
    dropped: float


def resident(rows: Tensor, scores: Tensor, valid: np.ndarray | None, width: int, cap: int) -> Resident:
    """The union of the tokens' rows with positive scores, at most `cap` of them: those of largest summed score.

    Args:
        rows, scores: (M, k).
        valid: (M,) bool: tokens that have a say; None: all.
        width: r. Where r <= cap every row has its own place, else they stand in ascending order from 0.

    Example:
        >>> found = resident(torch.tensor([[4, 2], [2, 0]]), torch.tensor([[1.0, 2.0], [3.0, -1.0]]), None, 5, 1)
        >>> found.rows.tolist(), found.places.tolist(), found.wanted, round(found.dropped, 3)
        ([2], [[-1, 0], [0, -1]], 2, 0.167)
    """
    numbers, values = rows.numpy(), scores.numpy()
    live = values > 0  # not so for nan
    if valid is not None:
        live &= valid[:, None]
    voted = numbers[live]
    mass = np.bincount(voted, weights=values[live].astype(np.float64), minlength=width)
    union = np.flatnonzero(mass)
    wanted, total, dropped = len(union), float(mass.sum()), 0.0
    if wanted > cap:
        ranked = union[np.argsort(-mass[union], kind="stable")]
        dropped = float(mass[ranked[cap:]].sum()) / total
        union = np.sort(ranked[:cap])
    slots = union if width <= cap else np.arange(len(union))
    place = np.full(width, -1, dtype=np.int32)
    place[union] = slots
    places = place[numbers]
    places[~live] = -1
    return Resident(union, slots, places, wanted, total, dropped)


def _in_dtype(part: Tensor, dtype: torch.dtype, work: Workspace) -> Tensor:
    if part.dtype == dtype:
        return part
    return work.take("cast", tuple(part.shape), dtype).copy_(part)
