"""The same steps on Python's integers, number by number."""

from __future__ import annotations


def to_fixed(x: float, bits: int) -> int:
    """x in units of 2^-bits, ties to even."""
    return round(x * 2**bits)


def advance(lag: int, base: int, origin: int, k: int) -> tuple[int, int]:
    """base + (lag - origin) / 2^k rounded down, and what the rounding drops."""
    quotient, remainder = divmod(lag - origin, 2**k)
    return base + quotient, remainder


def retreat(out: int, base: int, origin: int, remainder: int, k: int) -> int:
    """The lag that `advance` started from."""
    return (out - base) * 2**k + remainder + origin


def pack(values: list[int], k: int) -> list[int]:
    """The lowest k bits of each value: a plane of bytes for each of 8, 4, 2, 1 that k is the sum of, lowest bits first.

    In a plane of w bits a byte holds 8 / w values, which stand as far apart as the plane is long.
    """
    out, start = [], 0
    for width in (8, 4, 2, 1):
        if not k & width:
            continue
        length = -(-len(values) * width // 8)
        plane = [0] * length
        for i, value in enumerate(values):
            plane[i % length] += ((value // 2**start) % 2**width) * 2 ** (width * (i // length))
        out += plane
        start += width
    return out
