"""Streams of integers that a step forgets and a backward pass gets back bit by bit."""

from tightfit.ops.fixed_point.torch import (
    LIMIT,
    advance,
    change,
    finest,
    from_fixed,
    out_of_range,
    pack,
    retreat,
    to_fixed,
    unpack,
)

__all__ = [
    "LIMIT",
    "advance",
    "change",
    "finest",
    "from_fixed",
    "out_of_range",
    "pack",
    "retreat",
    "to_fixed",
    "unpack",
]
