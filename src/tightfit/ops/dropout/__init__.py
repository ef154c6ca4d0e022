"""Dropout that keeps one bit per element."""

from tightfit.ops.dropout.torch import dropout, noise_like

__all__ = ["dropout", "noise_like"]
