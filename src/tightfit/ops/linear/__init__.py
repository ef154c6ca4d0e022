"""A linear layer that keeps the source of its input instead of the input."""

from tightfit.ops.linear.torch import linear

__all__ = ["linear"]
