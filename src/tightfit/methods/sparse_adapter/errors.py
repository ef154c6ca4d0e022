"""Errors of the sparse adapter that are no plain values or states."""

from __future__ import annotations

from tightfit.core.errors import TightfitError


class HostMemoryError(TightfitError, MemoryError):
    """The rows do not fit the memory (or the disk) of the host; nothing was allocated."""


class NotFiniteError(TightfitError, FloatingPointError):
    """Hidden states or gradients of rows that are not finite; the message names the layer."""
