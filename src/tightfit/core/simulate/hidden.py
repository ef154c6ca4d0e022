"""Memory that a kernel takes and gives back inside one operator, where the dispatcher cannot see it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Signature:
    """What is needed to run one operator alone on zeros."""

    func: Any
    args: tuple
    kwargs: tuple


def may_hide(func) -> Callable | None:
    return None


def signature(func, args, kwargs) -> Signature:
    raise NotImplementedError
