"""How fast rounding errors grow when floating-point streams are undone, and where that is too fast."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from tightfit.methods.reversible.streams import Half
from tightfit.ops.autograd import autocast_dtype

TOLERANCE = 1e-3
"""Largest relative error of a stream that passes."""

_CONSTANT = 8.0
_HALF_PRECISION = 2.0**-9


def growth(halves: Sequence[Half], post_norm: bool) -> float:
    """Factor by which an error grows for every block that is undone.

    With one small factor m it is the larger root of the recurrence, ((1 + sqrt(1 + 4 m)) / 2)^2 / m before norms in
    front of the sublayers, max(1 / m, 1.25) behind them; with two of them about their product.
    """
    small = [half.factor for half in halves if half.part != "lagged"] or [1.0]
    if any(half.about for half in halves):
        return 1 / small[0]
    if len(small) == 2:
        return max(1 / math.prod(small), 1.25) * (1.0 if post_norm else 1.4)
    least = min(half.factor for half in halves)
    return max(1 / least, 1.25) if post_norm else ((1 + math.sqrt(1 + 4 * least)) / 2) ** 2 / least


def predicted_error(halves: Sequence[Half], post_norm: bool, blocks: int, unit: float) -> float:
    """Relative error of a stream after undoing that many blocks."""
    return _CONSTANT * unit * growth(halves, post_norm) ** blocks


def largest_distance(halves: Sequence[Half], post_norm: bool, unit: float) -> int:
    """The most blocks that can be undone within the tolerance; 0: none."""
    rate, blocks = growth(halves, post_norm), 0
    if rate <= 1:
        return 1000
    while _CONSTANT * unit * rate ** (blocks + 1) <= TOLERANCE:
        blocks += 1
    return blocks


def unit_of(dtype: torch.dtype) -> float:
    """Rounding of a stream whose blocks compute in this type."""
    if dtype in (torch.bfloat16, torch.float16):
        return _HALF_PRECISION
    return torch.finfo(dtype).eps / 2


def headroom(halves: Sequence[Half], post_norm: bool, blocks: int) -> int:
    """Bits by which the streams may grow beyond the stock model's states, besides those of the training."""
    factors = [half.factor for half in halves if half.part != "lagged"]
    m = max(factors)
    if any(half.about for half in halves):
        # behind norms x'' = m (x - x') + (something bounded); in front of them the streams grow as the stock states do
        rate = (m + math.sqrt(m * m + 4 * m)) / 2 if post_norm else 1.0
        return math.ceil(max(math.log2(blocks + 1), blocks * math.log2(rate))) if m > 0.25 else 0
    if post_norm:
        return math.ceil(math.log2(min(blocks + 1, 1 / (1 - m) if m < 1 else math.inf)))
    return math.ceil(blocks * len(factors) * math.log2((1 + math.sqrt(1 + 4 * m)) / 2))


def check_span(halves: Sequence[Half], post_norm: bool, blocks: int, hidden: Tensor, allowed: bool) -> None:
    """Refuse to undo so many blocks in floating point where what comes back is not what was there.

    Raises:
        ValueError: the predicted error is above `TOLERANCE`; names the largest safe distance.
    """
    dtype = autocast_dtype(hidden.device.type) or hidden.dtype
    refuse_inexact(halves, post_norm, blocks, dtype, allowed, warn=False)


def refuse_inexact(
    halves: Sequence[Half], post_norm: bool, blocks: int, dtype: torch.dtype, allowed: bool, *, warn: bool
) -> None:
    """The same for a type; where it is allowed, warn.

    Raises:
        ValueError: as `check_span`.
    """
    unit = unit_of(dtype)
    # half precision hits from the second block on: the first is undone from streams that were never rounded to it
    error = predicted_error(halves, post_norm, blocks, unit)
    safe = largest_distance(halves, post_norm, unit)
    if unit == _HALF_PRECISION:
        safe = max(safe, 1)
    if error <= TOLERANCE or blocks <= safe:
        return
    place = f"{blocks} blocks in {str(dtype).removeprefix('torch.')} have a predicted relative error of {error:.1e}"
    if allowed:
        if warn:
            warnings.warn(
                f"Reversible(allow_inexact=True): streams undone over {place}, above {TOLERANCE}; gradients of the "
                f"lower blocks are noise",
                UserWarning,
                stacklevel=2,
            )
        return
    remedy = f"anchors={safe} keeps both streams often enough" if safe else "no distance between anchors is safe"
    raise ValueError(
        f"Reversible(exact=False): streams undone over {place}, accepted is up to {TOLERANCE}: {remedy}; exact=True "
        f"has no error; allow_inexact=True overrides"
    )
