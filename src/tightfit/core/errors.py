"""Errors of the library: one base, each also the built-in kind a caller would expect."""

from __future__ import annotations

import signal

_LONGEST = 1500


class TightfitError(Exception):
    """Base of every error raised on purpose by tightfit."""

    def __str__(self) -> str:
        """The message: printable, and without the middle of a value that fills pages."""
        text = super().__str__().encode("utf-8", "backslashreplace").decode()
        half = _LONGEST // 2
        return text if len(text) <= _LONGEST else f"{text[:half]} [...] {text[-half:]}"


class Terminated(KeyboardInterrupt):
    """SIGTERM: as Ctrl-C, but the process ends with 143, as one that did not catch the signal."""

    exit_code = 128 + signal.SIGTERM


class ConflictError(TightfitError, ValueError):
    """A recipe whose edits cannot stand together; nothing was changed."""


class UnsupportedModelError(TightfitError, TypeError):
    """The model has a structure the method cannot work on; the message names the part."""


class UnknownTokenError(TightfitError, ValueError):
    """A token id outside the kept vocabulary reached the model or the loss."""


class BudgetError(TightfitError, ValueError):
    """No recipe fits the given memory budget."""


class ArtifactError(TightfitError, ValueError):
    """A saved artifact is damaged, incomplete, or belongs to another base model."""


class StateError(TightfitError, RuntimeError):
    """A call that does not fit the state things are in (applied twice, removed already, wrapped before)."""


class SelectorError(TightfitError, ValueError):
    """A module selector that names nothing in the model."""


class RecipeError(TightfitError, ValueError):
    """A recipe, or a recipe file, that cannot be read: unknown method, unknown field, wrong value."""


class DataError(TightfitError, ValueError):
    """A data file or row that cannot be used; the message names file, line and column."""


class SimulationError(TightfitError, RuntimeError):
    """A training step that cannot be simulated; the message names the operator and the module."""


class TrainingError(TightfitError, RuntimeError):
    """A run that failed while training (disk full, non-finite loss, out of memory)."""


def shorten(values, limit: int = 10) -> str:
    """Join the first `limit` values for a message and say how many more there are.

    >>> shorten([3, 1, 2], limit=2)
    '3, 1 and 1 more'
    """
    values = list(values)
    shown = ", ".join(str(v) for v in values[:limit])
    return shown if len(values) <= limit else f"{shown} and {len(values) - limit} more"
