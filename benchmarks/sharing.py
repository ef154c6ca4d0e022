"""One result file written by several processes: each takes rows that no other is at, and adds what it finds."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import record

Row = dict[str, Any]


@contextlib.contextmanager
def taken(name: str, key: str) -> Iterator[bool]:
    """True inside, unless another living process of this machine is at the row; a killed one lets go of it."""
    with _lock_file(name, key).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def add(name: str, config: dict[str, Any], row: Row, kept: Callable[[list[Row]], list[Row]]) -> None:
    """Add a row to what the result file holds now; `kept` drops and orders rows."""
    with _lock_file(name, "").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        record.write(name, config, kept([*record.rows(name), row]))


def _lock_file(name: str, key: str) -> Path:
    folder = Path(tempfile.gettempdir()) / "tightfit-benchmarks"
    folder.mkdir(exist_ok=True)
    place = hashlib.sha256(f"{record.RESULTS}\n{name}\n{key}".encode()).hexdigest()
    return folder / place[:32]
