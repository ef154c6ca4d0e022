"""Readable activations, for tests: plain autograd of the formulas."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def activation(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """y = f(x)."""
    return function(x)


def gated_activation(gate: Tensor, up: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """y = f(gate) * up."""
    return function(gate) * up
