"""One number per group of a token's channels: the projection on one direction."""

from tightfit.ops.subtoken.torch import INITS, Subtoken

__all__ = ["INITS", "Subtoken"]
