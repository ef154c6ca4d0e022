"""Labels as ids: class order, regression targets, and labels that training never sees."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from tightfit.core.documents import is_text
from tightfit.core.errors import DataError, shorten
from tightfit.train.rows import Rows

_NUMBER = re.compile(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*$")
_INTEGER = re.compile(r"[-+]?\d+$")


@dataclass(frozen=True)
class Labels:
    """Label ids (classes) or values (regression) of both sets; `names` is None for regression."""

    names: tuple[str, ...] | None
    train: list[Any]
    eval: list[Any]


def is_regression(*columns: list[Any]) -> bool:
    """Whether labels are numbers to predict: most of them are decimal fractions, in type or in spelling.

    >>> is_regression(["3.8", "0.0", "5.00"]), is_regression(["0", "1"]), is_regression([0.5, 1])
    (True, False, True)
    """
    values = [value for column in columns for value in column]
    decimal = sum(
        isinstance(v, float) or (isinstance(v, str) and not v.strip().isdigit() and bool(_NUMBER.match(v)) and "." in v)
        for v in values
    )
    return decimal * 2 >= len(values) > 0


def class_labels(train: Rows, held_out: Rows, column: str) -> Labels:
    """Class ids; classes are those of the training rows, sorted, whole numbers by value.

    Raises:
        DataError: a row without a label, one class only, or a label that only the eval rows have.
    """
    train_names = [class_name(v, train, row, column) for row, v in enumerate(train.column(column))]
    eval_names = [class_name(v, held_out, row, column) for row, v in enumerate(held_out.column(column))]
    names = train.classes.get(column) or ordered(set(train_names))
    if len(names) < 2:
        raise DataError(
            f"{train.source}, column {column!r}: all {len(train)} rows have the label {names[0]!r}; "
            f"classification needs at least two classes"
        )
    seen = set(train_names)
    for row, name in enumerate(eval_names):
        if name not in seen:
            raise DataError(unseen(name, held_out.place(row, column), train.source, names))
    ids = {name: i for i, name in enumerate(names)}
    return Labels(names, [ids[n] for n in train_names], [ids[n] for n in eval_names])


def regression_labels(train: Rows, held_out: Rows, column: str) -> Labels:
    """Labels as finite floats. Raises: DataError naming the row of a label that is no number."""

    def values(rows: Rows) -> list[float]:
        out = []
        for row, value in enumerate(rows.column(column)):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number and not (isinstance(value, str) and _NUMBER.match(value)):
                raise DataError(f"{rows.place(row, column)}: got {value!r}, accepted is a number (regression)")
            if not _is_finite(value):
                raise DataError(f"{rows.place(row, column)}: got {str(value)[:40]}, accepted is a finite number")
            out.append(float(value))
        return out

    return Labels(None, values(train), values(held_out))


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def class_name(value: Any, rows: Rows, row: int, column: str) -> str:
    """A label as text. Raises: DataError for an empty label or a value that cannot name a class."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int | float) or (isinstance(value, float) and not math.isfinite(value)):
        raise DataError(f"{rows.place(row, column)}: got {value!r}, accepted is a text or a number as label")
    name = str(value).strip()
    if not is_text(name):
        raise DataError(f"{rows.place(row, column)}: the label {name!r} is no valid Unicode")
    if not name:
        raise DataError(f"{rows.place(row, column)}: the label is empty")
    return name


def ordered(names: set[str]) -> tuple[str, ...]:
    """Sorted names, whole numbers by value.

    >>> ordered({"10", "9"}), ordered({"b", "a"})
    (('9', '10'), ('a', 'b'))
    """
    if all(len(name) < 4000 and _INTEGER.match(name) for name in names):  # longer ones Python does not read as numbers
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def unseen(name: str, place: str, source: str, known: tuple[str, ...]) -> str:
    """The message for a label that occurs in eval only."""
    return (
        f"{place}: label {name!r} occurs only in the eval rows, never in {source}; "
        f"training knows {shorten(map(repr, known))}"
    )
