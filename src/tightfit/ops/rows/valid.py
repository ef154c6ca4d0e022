"""Which rows of a batch matter, told by a block to the layers inside it."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tightfit.ops.autograd import version

FLOOR = 1e-3
"""What a masked row's score is multiplied with: never 0, so that a mask that is wrong costs variance, not the mean."""

_masks: contextvars.ContextVar[tuple[Tensor, ...]] = contextvars.ContextVar("masks", default=())
_ATTRIBUTE = "_tightfit_rows"


@contextlib.contextmanager
def attention_masks(*masks: Tensor | None) -> Iterator[None]:
    """While active, `row_factor` knows these masks: (B, S), or (B, 1, Q, S) as blocks get them.

    The latter are additive where they are floating point, and so is a (B, S) with a negative number in it or with
    zeros alone; all others are 0 or False where nobody may look.
    """
    token = _masks.set(tuple(_seen(m) for m in masks if isinstance(m, Tensor) and m.dim() in (2, 4)))
    try:
        yield
    finally:
        _masks.reset(token)


def row_factor(shape: Sequence[int]) -> Tensor | None:
    """(B L,) of 1 for rows that some query may look at and FLOOR for the others, for a tensor of (B, L, I).

    None where no mask of that shape is known.

    Example:
        >>> with attention_masks(torch.tensor([[1, 1, 0]])):
        ...     row_factor((1, 3, 8))
        tensor([1.0000, 1.0000, 0.0010])
    """
    if len(shape) != 3:
        return None
    found = next((seen for seen in _masks.get() if seen.shape == torch.Size(shape[:2])), None)
    return None if found is None else found.reshape(-1)


def _seen(mask: Tensor) -> Tensor:
    """(B, S): 1 where a position is seen, FLOOR elsewhere; made once for all blocks that get this mask."""
    known: tuple[int, Tensor] | None = getattr(mask, _ATTRIBUTE, None)
    if known is not None and known[0] == version(mask):
        return known[1]
    seen = mask.detach()
    if seen.dim() == 4:
        seen = (seen > torch.finfo(seen.dtype).min / 2 if seen.is_floating_point() else seen != 0)[:, 0].any(dim=-2)
    elif seen.is_floating_point():
        seen = torch.where((seen < 0).any() | (seen == 0).all(), seen >= 0, seen != 0)
    seen = torch.where(seen.bool(), 1.0, FLOOR)
    if not seen.is_inference():  # a step could not use it, and writes to such a mask would not be seen
        setattr(mask, _ATTRIBUTE, (version(mask), seen))
    return seen


def masked_rows(count: int) -> Tensor | None:
    """(count,) of 1 for the rows of a flattened batch that some query may look at, FLOOR for the others.

    None where no mask of that size is known.

    Example:
        >>> with attention_masks(torch.tensor([[1, 1, 0]])):
        ...     masked_rows(3)
        tensor([1.0000, 1.0000, 0.0010])
    """
    found = next((seen for seen in _masks.get() if seen.numel() == count), None)
    return None if found is None else found.reshape(-1)
