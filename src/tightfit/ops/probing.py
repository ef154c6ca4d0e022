"""How `calibrate` times operators of the package's own: each registers what one call of it is."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Run = Callable[[Tensor], object]
PROBES: dict[str, Callable[[Tensor], Run]] = {}
"""Operator without namespace -> a function that gets values (rows, 256) and returns one call of it on such values."""


def probe(operator: str) -> Callable[[Callable[[Tensor], Run]], Callable[[Tensor], Run]]:
    """Register a probe; the operator is then priced by its number of elements, as measured, not as a copy."""

    def keep(make: Callable[[Tensor], Run]) -> Callable[[Tensor], Run]:
        PROBES[operator] = make
        return make

    return keep
