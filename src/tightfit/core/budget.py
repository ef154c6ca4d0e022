"""Memory budgets: "8GiB", "500 MB" or a number of bytes."""

from __future__ import annotations

import math
import os
import re

from tightfit.core.errors import BudgetError

UNITS = {
    "B": 1,
    **{f"{letter}B": 1000**power for power, letter in enumerate("KMGT", start=1)},
    **{f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", start=1)},
}
_BY_LOWER = {unit.lower(): factor for unit, factor in UNITS.items()}
_TEXT = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)
_ACCEPTED = "an int number of bytes, or a text such as '8GiB' or '500 MB'"


def parse_budget(budget: str | int, *, device: str = "cpu", elsewhere: bool = False) -> int:
    """A memory budget in bytes.

    Args:
        budget: a number of bytes, or a number with a unit: KiB, MiB, GiB, TiB are powers of 1024; KB, MB, GB, TB
            powers of 1000.
        device: whose memory bounds the budget, "cpu" or "cuda".
        elsewhere: the budget is meant for another machine, so this one's memory does not bound it.

    Raises:
        BudgetError: no unit, an unknown one, zero, negative, not a number, or above the memory of the machine.

    Example:
        >>> parse_budget("1.5 GiB"), parse_budget("500MB"), parse_budget(4096)
        (1610612736, 500000000, 4096)
    """
    count = parse_bytes(budget, "budget")
    limit = None if elsewhere else machine_bytes(device)
    if limit is not None and count > limit:
        raise BudgetError(
            f"budget: got {budget!r} ({count:,} bytes), but the {device} of this machine has {limit / 2**30:.1f} GiB; "
            f"give at most that, or say that another machine is meant (elsewhere=True, --elsewhere)"
        )
    return count


def parse_bytes(value: str | int, name: str) -> int:
    """A size in bytes, from a number or a number with a unit; `name` begins the message of a BudgetError."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise BudgetError(f"{name}: got {value!r} ({type(value).__name__}), accepted is {_ACCEPTED}")
    count = value if isinstance(value, int) else _counted(value, name)
    if count <= 0:
        raise BudgetError(f"{name}: got {value!r}, accepted is more than zero: {_ACCEPTED}")
    return count


def _counted(text: str, name: str) -> int:
    match = _TEXT.fullmatch(text)
    if match is None:
        raise BudgetError(f"{name}: got {text!r}, accepted is {_ACCEPTED}")
    number, unit = match.groups()
    if not unit:
        raise BudgetError(f"{name}: got {text!r} without a unit; write '{number}GiB' or '{number}MiB', say")
    if unit.lower() not in _BY_LOWER:
        raise BudgetError(f"{name}: got {text!r} with the unit {unit!r}, accepted are {', '.join(UNITS)}")
    count = float(number) * _BY_LOWER[unit.lower()]
    if math.isinf(count):
        raise BudgetError(f"{name}: got {text!r}, which is beyond all numbers; accepted is {_ACCEPTED}")
    return round(count)


def machine_bytes(device: str = "cpu") -> int | None:
    """Memory of this machine's CPU side or GPU in bytes; None where it cannot be told (a GPU that is not here)."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_properties(device).total_memory if torch.cuda.is_available() else None
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
