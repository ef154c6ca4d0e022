"""Activations that keep their inputs only, from which the linear layer behind them rebuilds the output."""

from tightfit.ops.activation.few_bit import few_bit_activation
from tightfit.ops.activation.torch import activation, gated_activation, slope_of

__all__ = ["activation", "few_bit_activation", "gated_activation", "slope_of"]
