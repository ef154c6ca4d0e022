"""Where the segments of a batch lie: which columns of each row a step reads."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from tightfit.core.hfmodel import has_values


@dataclasses.dataclass
class Piece:
    """What one step reads.

    Attributes:
        columns: the columns of all rows, or (B, W) those of each one.
        counts: (B,) how many of its tokens are real; the others stand behind them. None: all.
        active: (B,) the row takes part in this step. None: all do.
        own: (B, W) whose output the token's is: real, and of the frame's tokens only those of the first and the last
            segment. None: all.
    """

    columns: slice | Tensor
    counts: Tensor | None = None
    active: Tensor | None = None
    own: Tensor | None = None

    def take(self, value: Tensor) -> Tensor:
        """(B, L, ...) -> (B, W, ...)."""
        if isinstance(self.columns, slice):
            return value[:, self.columns]
        index = self.columns.view(*self.columns.shape, *[1] * (value.dim() - 2))
        return value.gather(1, index.expand(*self.columns.shape, *value.shape[2:]))

    def mask(self, width: int) -> Tensor | None:
        """(B, W): which of its tokens are real."""
        if self.counts is None:
            return None
        return torch.arange(width, device=self.counts.device) < self.counts[:, None]

    def chosen(self, new: Tensor, old: Tensor) -> Tensor:
        """The state after the step: that of a row that takes no part stays."""
        return new if self.active is None else torch.where(self.active[:, None, None], new, old)


def pieces_from_start(length: int, segment: int, mask: Tensor | None) -> list[Piece]:
    """Segments that all rows begin together; a shorter row ends earlier.

    Args:
        length: tokens of a row, padding included. segment: tokens of a segment. mask: (B, L), padding on the right.

    >>> [(p.columns.start, p.columns.stop) for p in pieces_from_start(7, 3, None)]
    [(0, 3), (3, 6), (6, 7)]
    """
    found = []
    for start in range(0, length, segment):
        columns = slice(start, min(start + segment, length))
        if mask is None:
            found.append(Piece(columns))
            continue
        counts = mask[:, columns].ne(0).sum(1)
        active = counts > 0
        # a row that takes no part runs along on whatever is there, so that attention has something to look at
        found.append(Piece(columns, torch.where(active, counts, columns.stop - columns.start), active))
    return found


@dataclasses.dataclass
class Ends:
    """Segments that all rows end together: the last step reads the last segment of each, and gives its result.

    Attributes:
        pieces: one for each step.
        source: (B, L) for each column where its output stands among those of all steps, put side by side.
    """

    pieces: list[Piece]
    source: Tensor


def pieces_to_end(
    rows: int, length: int, segment: int, mask: Tensor | None, *, framing: int, align: str, device: torch.device
) -> Ends:
    """Cut the rows; with `framing` 2 each piece gets the row's first and last token around it.

    Args:
        rows, length: shape of the batch, padding included.
        segment: tokens of a segment, without those around it.
        mask: (B, L), padding on one side; or None.
        framing: tokens of a row that belong to no segment, 0 or 2.
        align: "left" fills segments from the start of a row, "right" from its end.
    """
    places = torch.arange(length, device=device)
    if mask is None:
        first = torch.zeros(rows, dtype=torch.long, device=device)
        size = torch.full((rows,), length, device=device)
    else:
        first = torch.where(mask.ne(0), places, length).amin(1).clamp_max(length - 1)
        size = mask.ne(0).sum(1)
    side = framing // 2
    text = (size - framing).clamp_min(0)
    widest = max(length - framing, 0)
    segment = max(min(segment, widest), 1)
    steps = max(-(-widest // segment), 1)
    own = (-(text // -segment)).clamp_min(1)
    short = text - (own - 1) * segment  # tokens of the segment that may not be full
    ends = (first + size - 1).clamp_min(0)
    width = segment + framing
    within = torch.arange(width, device=device)
    pieces = []
    for step in range(steps):
        number = step - (steps - own)
        active = number >= 0
        start = number * segment if align == "left" else text - (own - number) * segment
        stop = start + segment
        start, stop = start.clamp_min(0), torch.minimum(stop, text)
        count = torch.where(active, stop - start, segment).clamp_min(0)
        columns = (first + side + start.clamp_min(0))[:, None] + within - side
        if framing:
            columns = torch.where(within == 0, first[:, None], columns)
            columns = torch.where(within > count[:, None], ends[:, None], columns)
        owned = (within < (count + framing)[:, None]) & active[:, None]
        if framing:
            owned &= (within > 0) | (number == 0)[:, None]
            closing = (size > 1) & (step == steps - 1)
            owned &= (within != count[:, None] + 1) | closing[:, None]
        pieces.append(Piece(columns.clamp(0, length - 1), count + framing, active, owned))
    at = places - first[:, None] - side
    if align == "left":
        number = at.clamp_min(0) // segment
        column = at - number * segment
        last = short
    else:
        number = torch.where(at < short[:, None], 0, 1 + (at - short[:, None]) // segment)
        column = torch.where(number == 0, at, at - short[:, None] - (number - 1) * segment)
        last = torch.where(own == 1, short, segment)
    step_of = steps - own[:, None] + number
    source = step_of * width + column + side
    if framing:
        source = torch.where(places == first[:, None], (steps - own)[:, None] * width, source)
        source = torch.where(places == ends[:, None], (steps - 1) * width + 1 + last[:, None], source)
    return Ends(pieces, source.clamp(0, steps * width - 1))


def shifted_to_left(mask: Tensor | None) -> Tensor | None:
    """(B, L) for each column the one that moves there when padding on the left goes to the right; None: nothing moves.

    Simulated values are taken to be padded on the right.
    """
    if mask is None or not has_values(mask) or bool(mask[:, 0].ne(0).all()):
        return None
    places = torch.arange(mask.shape[1], device=mask.device)
    first = torch.where(mask.ne(0), places, mask.shape[1]).amin(1) % mask.shape[1]
    return (places + first[:, None]) % mask.shape[1]


def refuse_gaps(mask: Any) -> None:
    """Raise where a row has padding in between.

    Raises:
        ValueError: names the row.
    """
    if not torch.is_tensor(mask) or not has_values(mask):
        return
    real = mask.ne(0).long()
    runs = (real.diff(dim=1) == 1).sum(1) + real[:, 0]
    if bool((runs > 1).any()):
        row = int((runs > 1).nonzero()[0])
        raise ValueError(
            f"attention_mask: row {row} has padding between its tokens; RecurrentMemory accepts padding in front of "
            f"them or behind them"
        )
