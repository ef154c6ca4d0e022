"""Checks of a transform's fields at construction: every message names field, value and accepted range."""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Sequence
from typing import Any

_LARGEST = 2**63 - 1


def _brief(number: float) -> str:
    """A number in a message; Python refuses to write out whole numbers of thousands of digits."""
    return str(number) if abs(number) < 10**30 or isinstance(number, float) else f"{'-' * (number < 0)}10**30 and more"


def _owner(transform: Any, field: str) -> str:
    return f"{type(transform).__name__}({field}=...)"


def check_choice(transform: Any, field: str, allowed: Sequence[Any]) -> None:
    """Raise ValueError unless the field's value is one of `allowed`."""
    value = getattr(transform, field)
    if value not in allowed or isinstance(value, bool) != any(isinstance(a, bool) and a == value for a in allowed):
        listed = ", ".join(repr(a) for a in allowed)
        raise ValueError(
            f"{_owner(transform, field)}: got {value!r}, accepted is one of {listed}{near(value, allowed)}"
        )


def check_int(transform: Any, field: str, low: int, high: int | None = None, *, optional: bool = False) -> None:
    """Raise TypeError / ValueError unless the field is an int (never a bool) in [low, high]."""
    value = getattr(transform, field)
    if optional and value is None:
        return
    bound = f"an int >= {low}" if high is None else f"an int in [{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{_owner(transform, field)}: got {value!r} ({type(value).__name__}), accepted is {bound}")
    if value < low or value > (_LARGEST if high is None else high):
        raise ValueError(f"{_owner(transform, field)}: got {_brief(value)}, accepted is {bound}")


def check_float(
    transform: Any,
    field: str,
    low: float,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
    optional: bool = False,
) -> None:
    """Raise TypeError / ValueError unless the field is a finite number in the interval."""
    value = getattr(transform, field)
    if optional and value is None:
        return
    left, right = "(" if open_low or low == -math.inf else "[", ")" if open_high or high == math.inf else "]"
    bound = f"a number in {left}{low}, {high}{right}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{_owner(transform, field)}: got {value!r} ({type(value).__name__}), accepted is {bound}")
    too_low = value <= low if open_low else value < low
    too_high = value >= high if open_high else value > high
    if too_low or too_high or abs(value) > sys.float_info.max or math.isnan(value):
        raise ValueError(f"{_owner(transform, field)}: got {_brief(value)}, accepted is {bound}")


def check_bool(transform: Any, field: str) -> None:
    """Raise TypeError unless the field is True or False."""
    value = getattr(transform, field)
    if not isinstance(value, bool):
        raise TypeError(
            f"{_owner(transform, field)}: got {value!r} ({type(value).__name__}), accepted is True or False"
        )


def check_selector(transform: Any, field: str, *, optional: bool = False) -> None:
    """Raise TypeError / ValueError unless the field is a non-empty selector string."""
    value = getattr(transform, field)
    if optional and value is None:
        return
    if not isinstance(value, str):
        raise TypeError(
            f"{_owner(transform, field)}: got {value!r} ({type(value).__name__}), accepted is a selector string "
            f"such as '*.query|*.value'"
        )
    if not value.strip() or any(not part.strip() for part in value.split("|")):
        raise ValueError(
            f"{_owner(transform, field)}: got {value!r}, accepted is patterns joined by '|', none of them empty"
        )


def keep_tuples(transform: Any, field: str) -> None:
    """Make lists in the field tuples, which a value that is compared and hashed needs; JSON has lists only."""
    object.__setattr__(transform, field, _as_tuples(getattr(transform, field)))


def _as_tuples(value: Any) -> Any:
    return tuple(_as_tuples(v) for v in value) if isinstance(value, list | tuple) else value


def near(value: Any, allowed: Sequence[Any]) -> str:
    """A '; did you mean ...?' ending for a message, empty when nothing is close.

    >>> near("spilt", ["full", "split"])
    "; did you mean 'split'?"
    """
    if len(str(value)) > 100:
        return ""
    close = difflib.get_close_matches(str(value), [str(a) for a in allowed], n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
