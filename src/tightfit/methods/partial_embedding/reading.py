"""Rows of token ids out of any data a run may be given: texts, columns, data sets, streams, loaders, batches.

Every source is read as *tables* (a dict of columns, each with one entry per row) of bounded size; a table
becomes `Ragged` rows of ids, by reading its id columns or by tokenising its text columns as the run would.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from tightfit.core.errors import DataError, shorten

_ID_NAMES = frozenset({"prompt_ids", "completion_ids", "chosen_ids", "rejected_ids", "query_ids", "response_ids"})
_IGNORED_LABEL = -100

Table = Mapping[str, Any]


class Ragged:
    """Rows of ids laid end to end: `ids` (tokens,) and `lengths` (rows,)."""

    def __init__(self, ids: np.ndarray, lengths: np.ndarray):
        self.ids, self.lengths = ids, lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, rows: slice) -> Ragged:
        bounds = np.concatenate([[0], np.cumsum(self.lengths)])
        start, stop, _ = rows.indices(len(self))
        return Ragged(self.ids[bounds[start] : bounds[stop]], self.lengths[start:stop])

    def row_of(self, position: int) -> int:
        return int(np.searchsorted(np.cumsum(self.lengths), position, side="right"))

    def without(self, ignored: int) -> Ragged:
        kept = self.ids != ignored
        row_of = np.repeat(np.arange(len(self)), self.lengths)
        return Ragged(self.ids[kept], np.bincount(row_of[kept], minlength=len(self)))


def splits(data: Any) -> Iterator[tuple[str, Any]]:
    """The named parts of a DatasetDict, or the data itself under no name."""
    if isinstance(data, Mapping) and data and all(_is_kind(v, "Dataset", "IterableDataset") for v in data.values()):
        yield from data.items()
    else:
        yield "", data


def tables(data: Any, batch_size: int, samples: int | None, columns: Sequence[str] | None) -> Iterator[Table]:
    """Read `data` as tables of about `batch_size` rows, `samples` rows in all where that is given."""
    read = 0
    batch_size = batch_size if samples is None else min(batch_size, samples)
    for table in _all_tables(data, batch_size, samples, columns):
        n = table_rows(table)
        if samples is not None and read + n >= samples:
            yield {name: values[: samples - read] for name, values in table.items()}
            return
        read += n
        yield table


def table_rows(table: Table) -> int:
    sizes = {name: len(values) for name, values in table.items()}
    if len(set(sizes.values())) > 1:
        raise DataError(f"columns differ in length: {shorten(f'{k} {v}' for k, v in sizes.items())}")
    return next(iter(sizes.values()), 0)


def id_columns(
    table: Table,
    tokenizer: Any,
    columns: Sequence[str] | None,
    max_length: int | None,
    start: int,
    place: str,
) -> Iterator[tuple[str, Ragged]]:
    """Every column of a table that holds ids, or text made into ids, as (name, rows of ids)."""
    if missing := [name for name in columns or () if name not in table]:
        raise DataError(f"no column {missing[0]!r}{place}; the columns are {shorten(map(repr, table))}")
    names = list(columns) if columns is not None else _default_columns(table, place)
    texts = [name for name in names if isinstance(_first_leaf(table[name]), str)]
    for name in names:
        if name in texts:
            continue
        is_label = _is_label_name(name)
        ids = _flatten(table[name], f"column {name!r}{place}", start, optional=is_label)
        if ids is not None:
            yield name, ids.without(_IGNORED_LABEL) if is_label else ids
    as_pair = columns is not None and len(texts) == 2 and max_length is not None
    for group in [texts] if as_pair else [[name] for name in texts]:
        yield "+".join(group), _tokenise(table, group, tokenizer, max_length, start, place)


def _default_columns(table: Table, place: str) -> list[str]:
    if ids := [name for name in table if _is_id_name(name)]:
        return ids + [name for name in table if _is_label_name(name)]
    for name, values in table.items():
        first = values[0] if isinstance(values, list) and values else None
        if isinstance(first, (list, tuple)) and first and isinstance(first[0], Mapping):
            raise DataError(f"column {name!r}{place} holds chat turns; apply the chat template and give the ids")
    if texts := [name for name, values in table.items() if isinstance(_first_leaf(values), str)]:
        return texts
    if not table_rows(table):
        return []
    raise DataError(
        f"no column of ids or of text{place}; the columns are {shorten(map(repr, table)) or 'none'}. "
        "Name one with columns=..."
    )


def _tokenise(table: Table, names: list[str], tokenizer: Any, max_length: int | None, start: int, place: str) -> Ragged:
    if tokenizer is None:
        raise DataError(f"column {names[0]!r}{place} holds text; give the tokenizer of the run")
    for name in names:
        if (hole := next((i for i, text in enumerate(table[name]) if text is None), None)) is not None:
            raise DataError(f"column {name!r}{place} has no text in row {start + hole}; drop or fill that row")
    encoded = tokenizer(
        *(list(table[name]) for name in names),
        is_split_into_words=not isinstance(table[names[0]][0], str),
        truncation=max_length is not None,
        max_length=max_length,
        padding=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    ids = _flatten(encoded["input_ids"], f"the ids of column {names[0]!r}{place}", start)
    assert ids is not None
    return ids


def _is_id_name(name: Any) -> bool:
    return isinstance(name, str) and (name == "input_ids" or name.endswith("_input_ids") or name in _ID_NAMES)


def _is_label_name(name: Any) -> bool:
    return isinstance(name, str) and (name == "labels" or name.endswith("_labels"))


def _first_leaf(values: Any) -> Any:
    """The first entry that is not None, looked for inside lists too; None for tensors and empty columns."""
    if isinstance(values, (list, tuple)):
        return next((leaf for v in values if (leaf := _first_leaf(v)) is not None), None)
    return values if isinstance(values, (str, int, float)) else None


def _flatten(rows: Any, where: str, start: int, optional: bool = False) -> Ragged | None:
    """Rows of ids laid end to end; None for an optional column that holds no sequences of integers."""
    if isinstance(rows, Ragged):
        return rows
    if isinstance(rows, torch.Tensor):
        rows = rows.detach().cpu().numpy()
    flat = lengths = None
    if isinstance(rows, np.ndarray) and rows.dtype != object:
        if rows.ndim > 1:
            flat, lengths = rows.reshape(-1), np.full(len(rows), int(np.prod(rows.shape[1:])))
    elif all(_is_row(row) for row in rows):
        if any(len(row) and _is_row(row[0]) for row in rows):  # choices within a row
            inner = [_flatten(row, where, start + i, optional) for i, row in enumerate(rows)]
            parts = [part for part in inner if part is not None]
            if len(parts) == len(inner):
                flat, lengths = np.concatenate([p.ids for p in parts]), np.array([len(p.ids) for p in parts])
        else:
            lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
            arrays = len(rows) > 0 and hasattr(rows[0], "dtype")
            flat = np.concatenate([np.asarray(r) for r in rows]) if arrays else _array(itertools.chain(*rows))
    if flat is not None and lengths is not None and (not flat.size or flat.dtype.kind in "iu"):
        return Ragged(flat.astype(np.int64, copy=False), lengths)
    if optional:
        return None
    bad = next((i for i, row in enumerate(rows) if not _is_row(row)), 0)
    raise DataError(f"{where} should hold rows of integer ids; row {start + bad} is {str(rows[bad])[:60]}")


def _is_row(value: Any) -> bool:
    return hasattr(value, "__len__") and not isinstance(value, (str, Mapping)) and getattr(value, "ndim", 1) > 0


def _array(values: Iterable[Any]) -> np.ndarray:
    listed = list(values)
    try:
        return np.array(listed)
    except OverflowError:
        return np.array(listed, dtype=object)


def _is_kind(data: Any, *names: str) -> bool:
    """Whether data is of one of these `datasets` classes; a module never imported has made no object."""
    module = sys.modules.get("datasets")
    return module is not None and isinstance(data, tuple(getattr(module, name) for name in names))


def _all_tables(data: Any, batch_size: int, samples: int | None, columns: Sequence[str] | None) -> Iterator[Table]:
    if isinstance(data, (str, bytes)):
        raise DataError(f"the data is one string ({str(data)[:40]!r}); give a list of texts")
    if _is_kind(data, "Dataset"):
        yield from _dataset_tables(data, batch_size, columns)
    elif isinstance(data, Mapping):
        for start in range(0, table_rows(data), batch_size):
            yield {name: values[start : start + batch_size] for name, values in data.items()}
    elif isinstance(data, torch.utils.data.DataLoader):
        _need_budget(data.dataset, samples)
        with _kept_random_state(data):
            yield from map(_batch_columns, data)
    else:
        _need_budget(data, samples)
        if isinstance(data, torch.utils.data.Dataset) and hasattr(data, "__len__"):
            data = map(data.__getitem__, range(len(data)))
        yield from _row_tables(data, batch_size)


def _need_budget(data: Any, samples: int | None) -> None:
    stream = _is_kind(data, "IterableDataset") or isinstance(data, torch.utils.data.IterableDataset)
    if stream and samples is None and not hasattr(data, "__len__"):
        raise DataError(
            f"{type(data).__name__} is a stream without length, so counting might never end. Give the kept "
            'ids (ids=...), or a budget of rows (samples=...) with unknown="grow", or use unknown="fetch"'
        )


def _dataset_tables(data: Any, batch_size: int, columns: Sequence[str] | None) -> Iterator[Table]:
    if data.format["type"] == "custom":  # the user's transform: its output is what the run sees
        for start in range(0, len(data), batch_size):
            yield dict(data[start : start + batch_size])
        return
    arrow = data.with_format("arrow")
    names = arrow.column_names
    if columns is None and any(map(_is_id_name, names)):
        names = [name for name in names if _is_id_name(name) or _is_label_name(name)]
    for start in range(0, len(arrow), batch_size):
        table = arrow[start : start + batch_size]
        yield {name: _from_arrow(table.column(name)) for name in names}


def _from_arrow(column: Any) -> Any:
    """Ids flat, texts and nested rows as lists; columns of other types are left as they are."""
    import pyarrow as pa
    import pyarrow.compute as pc

    leaf, depth = column.type, 0
    while pa.types.is_list(leaf) or pa.types.is_large_list(leaf) or pa.types.is_fixed_size_list(leaf):
        leaf, depth = leaf.value_type, depth + 1
    if pa.types.is_integer(leaf) and depth == 1 and not column.null_count:
        flat = pc.list_flatten(column)
        if not flat.null_count:
            return Ragged(flat.to_numpy(), pc.list_value_length(column).to_numpy())
    is_text = pa.types.is_string(leaf) or pa.types.is_large_string(leaf)
    return column.to_pylist() if is_text or (depth and not pa.types.is_floating(leaf)) else column


def _row_tables(data: Iterable[Any], batch_size: int) -> Iterator[Table]:
    """Tables from an iterable of texts, text pairs (tuples), rows of words or ids, dicts, or batches."""
    for kind, group in itertools.groupby(data, _row_kind):
        if kind == "batch":
            yield from map(_batch_columns, group)
            continue
        while rows := list(itertools.islice(group, batch_size)):
            if kind == "dict":
                names = dict.fromkeys(itertools.chain.from_iterable(rows))
                yield {name: [row.get(name) for row in rows] for name in names}
            elif kind == "pair":
                yield {f"text_{k}": list(texts) for k, texts in enumerate(itertools.zip_longest(*rows))}
            else:
                yield {kind: rows}


def _row_kind(row: Any) -> str:
    if isinstance(row, Mapping):
        return "batch" if _is_batch(row) else "dict"
    if isinstance(row, str):
        return "text"
    if isinstance(row, (list, tuple)) and len(row) and isinstance(row[0], str):
        return "pair" if isinstance(row, tuple) else "words"
    if isinstance(row, tuple) and len(row) and hasattr(row[0], "ndim"):
        return "batch"  # (ids, mask, ...) without names: refused there
    return "input_ids"


def _is_batch(item: Mapping) -> bool:
    """Whether a dict holds several rows: a column of ids in it has rows inside."""
    for name, value in item.items():
        if _is_id_name(name) and _is_row(value) and len(value):
            return value.ndim > 1 if hasattr(value, "ndim") else _is_row(value[0])
    return False


def _batch_columns(batch: Any) -> Table:
    """The columns of a batch that have one entry per row of its ids."""
    if not isinstance(batch, Mapping):
        raise DataError(
            f"a row or batch is a {type(batch).__name__}, whose columns have no names; give dicts "
            "with 'input_ids', or rows of ids"
        )
    columns = {}
    for name, value in batch.items():
        if getattr(value, "ndim", None) == 1 and _is_id_name(name):
            value = value[None]  # one packed row
        if _is_row(value):
            columns[name] = value
    sizes = {len(value) for name, value in columns.items() if _is_id_name(name)}
    return {name: v for name, v in columns.items() if len(v) in sizes} if len(sizes) == 1 else columns


@contextlib.contextmanager
def _kept_random_state(loader: Any) -> Iterator[None]:
    """Starting a DataLoader draws random numbers; the run after the scan must draw the same ones again."""
    owners = (loader, loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None))
    generators = [g for g in (getattr(owner, "generator", None) for owner in owners) if g is not None]
    states = [g.get_state() for g in generators]
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for generator, state in zip(generators, states):
            generator.set_state(state)
