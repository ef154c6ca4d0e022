"""Normalisation layers that keep their input only, from which the layers behind them rebuild the output."""

from tightfit.ops.norm.torch import layer_norm, rms_norm

__all__ = ["layer_norm", "rms_norm"]
