"""Where rows come from: local files and folders, hub data sets, the embedded docstrings; the eval split."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tightfit.core.errors import DataError
from tightfit.core.fields import near
from tightfit.train.recipe_file import DataSection, is_local
from tightfit.train.rows import Rows, read_rows

if TYPE_CHECKING:
    from datasets import Dataset

DEMO = "demo:stdlib"
_SPLIT_SEED = 0  # the split never follows train.seed: runs over several seeds share their eval rows
_EVAL_NAMES = ("validation", "valid", "dev", "test")


def read_sources(section: DataSection) -> tuple[Rows, Rows | None, list[str]]:
    """Rows of `train` and `eval` (None: to be split off), and notes for the user. Raises: DataError."""
    if section.train == DEMO:
        train, held_out = demo_rows()
        if section.eval is None or section.eval == DEMO:
            held_out = _first(held_out, section.eval_rows)
        else:
            held_out, _ = _read(section.eval, section, "eval", section.eval_rows)
        return _first(train, section.rows), held_out, []
    train, eval_split = _read(section.train, section, "train", section.rows)
    if section.eval is not None:
        if section.eval == DEMO:
            return train, _first(demo_rows()[1], section.eval_rows), []
        return train, _read(section.eval, section, "eval", section.eval_rows)[0], []
    if eval_split is not None:
        name = f"{section.train.partition(':')[0]}:{eval_split}"
        return (
            train,
            _read(name, section, "eval", section.eval_rows)[0],
            [f"eval rows are the split {eval_split!r}"],
        )
    return train, None, []


def demo_rows() -> tuple[Rows, Rows]:
    """The embedded docstring data: train and eval rows with the columns `text` and `package`."""
    from tightfit.train.demo_data import stdlib_docstrings

    docstrings = stdlib_docstrings()
    if len({d.package for d in docstrings}) < 2:
        raise DataError(f"{DEMO}: this Python carries no source files of its standard library; give a data file")

    def rows(split: str) -> Rows:
        kept = [d for d in docstrings if d.split == split]
        columns = {"text": [d.text for d in kept], "package": [d.package for d in kept]}
        return Rows(f"{DEMO} ({split})", columns, range(1, len(kept) + 1), unit="row")

    return rows("train"), rows("eval")


def split_off(
    rows: Rows, fraction: float, limit: int | None = None, strata: Sequence[Any] | None = None
) -> tuple[Rows, Rows, str]:
    """Hold out a fixed random part of the rows, the same for every `train.seed`.

    Args:
        strata: class of each row; every class keeps its share in both parts and at least one training row.

    Returns:
        train rows, eval rows, and a note that says what was done.
    """
    if len(rows) < 2:
        raise DataError(f"{rows.source}: one row cannot be split into train and eval; give data.eval")
    random = np.random.default_rng(_SPLIT_SEED)
    groups: dict[Any, list[int]] = {}
    for row in range(len(rows)):
        groups.setdefault(None if strata is None else strata[row], []).append(row)
    candidates: list[tuple[float, int]] = []
    for group in groups.values():
        order = random.permutation(len(group))
        for rank, position in enumerate(order[: len(group) - 1]):
            candidates.append(((rank + 0.5) / len(group), group[position]))
    candidates.sort()
    wanted = max(1, round(fraction * len(rows)))
    chosen = {row for _, row in candidates[: min(wanted, limit or wanted)]}
    if not chosen:
        raise DataError(f"{rows.source}: no label occurs twice, so no eval rows can be split off; give data.eval")
    train = rows.take([row for row in range(len(rows)) if row not in chosen])
    note = f"no eval data: {len(chosen)} of {len(rows)} rows are held out at random, the same for any seed"
    return train, rows.take(sorted(chosen)), note


def split_tail(rows: Rows, fraction: float, limit: int | None = None) -> tuple[Rows, Rows, str]:
    """Hold out the last part of a running text."""
    if len(rows) < 2:
        raise DataError(f"{rows.source}: one line cannot be split into train and eval; give data.eval")
    held = min(len(rows) - 1, max(1, round(fraction * len(rows))))
    cut = len(rows) - held
    tail = list(range(cut, len(rows)))[:limit]
    note = f"no eval data: the last {held} of {len(rows)} lines of {rows.source} are held out"
    return rows.take(range(cut)), rows.take(tail), note


def _first(rows: Rows, limit: int | None) -> Rows:
    return rows if limit is None or limit >= len(rows) else rows.take(range(limit))


def _read(name: str, section: DataSection, key: str, limit: int | None) -> tuple[Rows, str | None]:
    path = Path(name).expanduser()
    where, _, split = name.partition(":")
    for folder, part in ((path, ""), (Path(where).expanduser(), split)):
        if os.path.isdir(folder):  # pathlib raises for a name too long
            return _from_datasets(name, str(folder), part, section, key, limit)
    if is_local(name):
        return read_rows(path, columns=section.columns, limit=limit, format=section.format), None
    return _from_datasets(name, where, split, section, key, limit)


def _from_datasets(
    name: str, where: str, split: str, section: DataSection, key: str, limit: int | None
) -> tuple[Rows, str | None]:
    import datasets

    saved = os.path.isdir(where) and any(
        (Path(where) / marker).exists() for marker in ("dataset_info.json", "dataset_dict.json", "state.json")
    )
    try:
        found = datasets.load_from_disk(where) if saved else datasets.load_dataset(where, section.subset)
    except Exception as error:  # the library raises a dozen unrelated kinds, among them network errors
        kind = "data folder" if os.path.isdir(where) else "file of this name here, and no hub data set"
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"data.{key}: {name!r}: no readable {kind} ({type(error).__name__}: {reason})") from None
    eval_split = None
    if isinstance(found, datasets.DatasetDict):
        splits = list(found)
        split = split or (key if key in splits else "train" if key == "train" else "")
        split = split or next((n for n in _EVAL_NAMES if n in splits), None) or splits[0]
        if split not in splits:
            raise DataError(
                f"data.{key}: {name!r}: no split {split!r}; it has {', '.join(splits)}{near(split, splits)}"
            )
        eval_split = next((n for n in _EVAL_NAMES if n in splits and n != split), None)
        found = found[split]
    elif split:
        raise DataError(f"data.{key}: {name!r}: one data set without splits; leave out ':{split}'")
    found = found if limit is None else found.select(range(min(limit, len(found))))
    if not len(found):
        raise DataError(f"data.{key}: {name!r}: the data set has no rows")
    return _dataset_rows(found, name), eval_split


def _dataset_rows(found: Dataset, name: str) -> Rows:
    from datasets import ClassLabel, List, Sequence

    columns: dict[str, list[Any]] = {}
    classes: dict[str, tuple[str, ...]] = {}
    for column, feature in found.features.items():
        values = found[column][:]
        inner = feature.feature if isinstance(feature, List | Sequence) else feature
        if isinstance(inner, ClassLabel):
            names = tuple(name.strip() for name in inner.names)
            classes[column] = names
            values = [
                _named(value, names, f"{name}, row {row}, column {column!r}") for row, value in enumerate(values, 1)
            ]
        columns[column] = values
    return Rows(name, columns, range(1, len(found) + 1), unit="row", classes=classes)


def _named(value: Any, names: tuple[str, ...], place: str) -> Any:
    if isinstance(value, list):
        return [_named(item, names, place) for item in value]
    if value is None:
        return None
    if not 0 <= value < len(names):
        raise DataError(
            f"{place}: got label {value}, accepted are 0 to {len(names) - 1} (is this an unlabelled split?)"
        )
    return names[value]
