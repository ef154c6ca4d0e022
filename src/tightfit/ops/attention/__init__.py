"""Attention that keeps q, k and v only; its backward runs in that of the output projection."""

from tightfit.ops.attention.torch import attention, dropout_attention

__all__ = ["attention", "dropout_attention"]
