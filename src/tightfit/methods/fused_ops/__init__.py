"""FusedOps: the operators of a step keep each tensor once, and rebuild what can be rebuilt."""

from tightfit.methods.fused_ops.transform import FusedOps

__all__ = ["FusedOps"]
