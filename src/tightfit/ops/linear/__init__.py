"""A linear layer that keeps the source of its input instead of the input."""

from tightfit.ops.linear.torch import add_scaled, linear

__all__ = ["add_scaled", "linear"]
