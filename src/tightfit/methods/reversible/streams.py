"""The two streams of a reversible stack, as integers or as floating point, and what a half step does to them."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from tightfit.ops import fixed_point

Streams = tuple[Tensor, Tensor]
"""(lagging stream, state) in this order, of one shape."""


@dataclasses.dataclass(frozen=True)
class Half:
    """One update of one stream by a function of the other: new = function(read) + factor * (other - origin).

    Attributes:
        part: whose output the function is: "block", "lagged" (an adapter), "attention" or "mlp" (halves of the block).
        factor: in (0, 1].
        about: the origin is the stream that is read, else 0.
        reads: which stream is read; the other one is replaced.
        turns: the streams change places afterwards.
    """

    part: str
    factor: float
    about: bool = False
    reads: int = 1
    turns: bool = True

    @property
    def shift(self) -> int:
        """k of the factor 2^-k."""
        return round(-torch.tensor(self.factor, dtype=torch.float64).log2().item())

    def after(self, read: Tensor, new: Tensor) -> Streams:
        """The streams once this half is done."""
        pair = (new, read) if self.reads else (read, new)
        return pair[::-1] if self.turns else pair

    def before(self, read: Tensor, old: Tensor) -> Streams:
        """The streams this half began with."""
        return (old, read) if self.reads else (read, old)

    def split(self, after: Streams) -> tuple[Tensor, Tensor]:
        """(stream that was read, new stream) of the streams after this half."""
        pair = after[::-1] if self.turns else after
        return (pair[1], pair[0]) if self.reads else pair


class Fixed:
    """Streams of int32 in units of 2^-bits; every step can be undone bit by bit."""

    exact = True

    def __init__(self, bits: int):
        self.bits = bits

    def open(self, hidden: Tensor) -> Tensor:
        return fixed_point.to_fixed(hidden, self.bits)

    def value(self, stream: Tensor, dtype: torch.dtype, bad: Tensor | None = None) -> Tensor:
        return fixed_point.from_fixed(stream, self.bits, dtype, bad)

    def out_of_range(self, stream: Tensor) -> Tensor | None:
        return fixed_point.out_of_range(stream)

    def forward(self, half: Half, old: Tensor, read: Tensor, x: Tensor, out: Tensor) -> tuple[Tensor, Tensor | None]:
        """(new stream, what must be kept to undo it)."""
        base, origin = self._base(half, read, x, out)
        return fixed_point.advance(old, base, origin, half.shift)

    def inverse(self, half: Half, new: Tensor, read: Tensor, x: Tensor, out: Tensor, dropped: Tensor | None) -> Tensor:
        """The stream that was replaced."""
        base, origin = self._base(half, read, x, out)
        return fixed_point.retreat(new, base, origin, dropped, half.shift)

    def _base(self, half: Half, read: Tensor, x: Tensor, out: Tensor) -> tuple[Tensor, Tensor | None]:
        if half.about:
            return fixed_point.change(out, x, self.bits).add_(read), read
        return fixed_point.to_fixed(out, self.bits), None


class Floating:
    """Streams in floating point, at least float32; undoing a step multiplies their rounding errors."""

    exact = False

    def open(self, hidden: Tensor) -> Tensor:
        return hidden.detach().to(_wide(hidden.dtype))

    def value(self, stream: Tensor, dtype: torch.dtype, bad: Tensor | None = None) -> Tensor:
        return stream.detach().to(dtype)

    def out_of_range(self, stream: Tensor) -> Tensor | None:
        return None

    def forward(self, half: Half, old: Tensor, read: Tensor, x: Tensor, out: Tensor) -> tuple[Tensor, Tensor | None]:
        """(new stream, nothing)."""
        far = old - read if half.about else old
        return torch.add(self._base(half, read, x, out), far, alpha=half.factor), None

    def inverse(self, half: Half, new: Tensor, read: Tensor, x: Tensor, out: Tensor, dropped: Tensor | None) -> Tensor:
        """The stream that was replaced, nearly."""
        far = (new - self._base(half, read, x, out)).div_(half.factor)
        return far.add_(read) if half.about else far

    def _base(self, half: Half, read: Tensor, x: Tensor, out: Tensor) -> Tensor:
        wide = out.to(read.dtype)
        return read + (wide - x.to(read.dtype)) if half.about else wide


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
