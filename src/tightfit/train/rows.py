"""Rows of local data files, read strictly: every complaint names file, line and column."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Rows:
    """Columns of one data file, with the place each row came from."""

    source: str
    columns: dict[str, list[Any]]
    lines: Sequence[int]  # 1-based line of each row's start
    unit: str = "line"

    def __len__(self) -> int:
        return len(self.lines)


def read_rows(
    path: str | Path,
    *,
    columns: Sequence[str] | None = None,
    limit: int | None = None,
    format: str | None = None,
) -> Rows:
    """Read a local tsv, csv, jsonl, json, parquet, conll or txt file, or .gz of these. Raises: DataError."""
    raise NotImplementedError
