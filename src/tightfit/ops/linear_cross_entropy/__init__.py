"""Cross-entropy of a linear head that never holds its logits; `reference` is the readable oracle."""

from tightfit.ops.linear_cross_entropy.reference import HeadLoss
from tightfit.ops.linear_cross_entropy.torch import linear_cross_entropy

__all__ = ["HeadLoss", "linear_cross_entropy"]
