"""The embedded data set: docstrings of the standard library, to be told apart by package."""

from __future__ import annotations

from typing import NamedTuple


class DocstringRow(NamedTuple):
    """One masked docstring, the package it comes from, and the split it is in."""

    text: str
    package: str
    split: str  # "train" or "eval"


def stdlib_docstrings() -> list[DocstringRow]:
    """Docstrings of this machine's standard library, masked, sorted, the same on every run."""
    raise NotImplementedError
