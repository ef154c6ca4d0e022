"""Fixed point: streams of int32 with a step that can be undone bit by bit.

A step adds to a base the share 2^-k of how far the lagging stream is from an origin. A shift by k bits divides, the k
bits that it drops are kept, and so nothing is lost. Numbers of a stream stay below `LIMIT`, which leaves room for one
sum without a carry out of 32 bits.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LIMIT = 2**29
"""Streams stay below this; `out_of_range` says whether one does."""

_BOUND = float(2 * LIMIT)
_PLANES = (8, 4, 2, 1)


def to_fixed(x: Tensor, bits: int) -> Tensor:
    """x in units of 2^-bits, as int32; what does not fit, infinities and NaN become numbers out of range.

    >>> to_fixed(torch.tensor([1.0, -0.25, float("nan")]), 2).tolist()
    [4, -1, 1073741824]
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return _rounded(wide * 2.0**bits)


def change(out: Tensor, x: Tensor, bits: int) -> Tensor:
    """out - x in units of 2^-bits, as int32, subtracted in at least float32."""
    wide = torch.promote_types(torch.promote_types(out.dtype, x.dtype), torch.float32)
    return _rounded((out.to(wide) - x.to(wide)).mul_(2.0**bits))


def _rounded(scaled: Tensor) -> Tensor:
    return scaled.clamp_(-_BOUND, _BOUND).nan_to_num_(nan=_BOUND).round_().to(torch.int32)


def from_fixed(stream: Tensor, bits: int, dtype: torch.dtype, bad: Tensor | None = None) -> Tensor:
    """The numbers of a stream; all NaN where the flag `bad` (0-dim) is set, so that an overflow is seen in the loss."""
    wide = stream.to(torch.promote_types(dtype, torch.float32))
    if bad is None:
        return wide.mul_(2.0**-bits).to(dtype)
    return wide.mul_(torch.where(bad, math.nan, 2.0**-bits)).to(dtype)


def out_of_range(stream: Tensor) -> Tensor:
    """Whether a stream has left its range (0-dim boolean on the stream's device)."""
    low, high = torch.aminmax(stream)
    return (low <= -LIMIT) | (high >= LIMIT)


def finest(largest: float, headroom: int = 4, most: int = 24) -> int:
    """The most bits behind the point at which numbers up to `largest` stay 2^headroom below the limit.

    >>> finest(8.0), finest(0.01), finest(3000.0)
    (22, 24, 13)
    """
    if largest <= 0:
        return most
    return min(most, int(math.log2(LIMIT)) - headroom - math.ceil(math.log2(largest)))


def advance(lag: Tensor, base: Tensor, origin: Tensor | None, k: int) -> tuple[Tensor, Tensor | None]:
    """base + (lag - origin) / 2^k rounded down, and the k bits that the rounding drops (uint8; None for k = 0).

    Args:
        lag, base, origin: int32 of one shape; None: 0.
        k: 0 to 12.

    Example:
        >>> lag, base = torch.tensor([100, -7], dtype=torch.int32), torch.tensor([10, 20], dtype=torch.int32)
        >>> out, dropped = advance(lag, base, None, 3)
        >>> out.tolist(), retreat(out, base, None, dropped, 3).tolist()
        ([22, 19], [100, -7])
    """
    far = lag if origin is None else lag - origin
    dropped = pack(far, k) if k else None
    return base + (far >> k if k else far), dropped


def retreat(out: Tensor, base: Tensor, origin: Tensor | None, dropped: Tensor | None, k: int) -> Tensor:
    """The lag that `advance` started from."""
    far = out - base
    if dropped is not None:
        far.bitwise_left_shift_(k).bitwise_or_(unpack(dropped, k, out.shape))
    return far if origin is None else far.add_(origin)


def pack(values: Tensor, k: int) -> Tensor:
    """The lowest k bits of each integer: k / 8 bytes a value, in planes of 8, 4, 2 and 1 bits.

    >>> pack(torch.tensor([1, 2, 3, -1], dtype=torch.int32), 4).tolist()
    [49, 242]
    """
    flat, planes, start = values.reshape(-1), [], 0
    for width in _PLANES:
        if k & width:
            part = (flat >> start if start else flat).to(torch.uint8)
            planes.append(_folded(part, width))
            start += width
    return planes[0] if len(planes) == 1 else torch.cat(planes)


def _folded(part: Tensor, width: int) -> Tensor:
    if width == 8:
        return part
    turns = 8 // width
    if part.numel() % turns:
        part = F.pad(part, (0, -part.numel() % turns))
    rows = part.bitwise_and_(2**width - 1).view(turns, -1)
    out = rows[0].clone()
    for turn in range(1, turns):
        out |= rows[turn] << (width * turn)
    return out


def unpack(packed: Tensor, k: int, shape: torch.Size) -> Tensor:
    """What `pack` kept, as int32 of the given shape."""
    count, start, at = shape.numel(), 0, 0
    out: Tensor | None = None
    for width in _PLANES:
        if k & width:
            length = -(-count * width // 8)
            plane = _unfolded(packed[at : at + length], width, count).to(torch.int32)
            out = plane if out is None else out.bitwise_or_(plane.bitwise_left_shift_(start))
            start, at = start + width, at + length
    assert out is not None
    return out.view(shape)


def _unfolded(plane: Tensor, width: int, count: int) -> Tensor:
    if width == 8:
        return plane
    rows = [(plane >> (width * turn)) & (2**width - 1) for turn in range(8 // width)]
    return torch.cat(rows)[:count]
