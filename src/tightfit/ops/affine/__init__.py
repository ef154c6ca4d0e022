"""Groups of a token's channels as 8- or 4-bit integers with a range each."""

from tightfit.ops.affine.torch import Affine

__all__ = ["Affine"]
