"""Attention whose keys and values get another share of the gradient from their own query than from other queries."""

from tightfit.ops.own_key.torch import own_key, own_probability

__all__ = ["own_key", "own_probability"]
