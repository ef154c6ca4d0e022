"""Rows of local data files, read strictly: every complaint names file, line and column.

Files are streamed, also through gzip; text is UTF-8 and nothing else. A line ends at a newline, so that
other separators inside a text stay text. TSV is unquoted (as in GLUE), CSV is quoted as in RFC 4180.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from tightfit.core.documents import is_text
from tightfit.core.errors import DataError
from tightfit.core.fields import near

FORMATS = ("tsv", "csv", "jsonl", "json", "parquet", "conll", "txt")
_LONGEST_FIELD = 2**31 - 1
_UNPACKED_BYTES, _UNPACKED_RATIO = 2**28, 300
"""What a small archive may come to, and a large one as a multiple of its size."""


@dataclass(frozen=True)
class Rows:
    """Columns of one data file, with the place each row came from."""

    source: str
    columns: dict[str, list[Any]]
    lines: Sequence[int]  # 1-based line of each row's start, or its number where a file has no lines
    unit: str = "line"
    classes: dict[str, tuple[str, ...]] = field(default_factory=dict)  # class order a data set declares
    running: bool = False  # rows are the lines of one running text, with their newlines

    def __len__(self) -> int:
        return len(self.lines)

    def place(self, row: int, column: str | None = None) -> str:
        """`file, line 12, column 'label'` for a message."""
        where = f"{self.source}, {self.unit} {self.lines[row]}"
        return where if column is None else f"{where}, column {column!r}"

    def column(self, name: str) -> list[Any]:
        """The values of a column. Raises: DataError when there is no such column, or a row has no value."""
        if name not in self.columns:
            raise DataError(
                f"{self.source}: no column {name!r}; its columns are {', '.join(map(repr, self.columns))}"
                f"{near(name, list(self.columns))}"
            )
        values = self.columns[name]
        empty = next((row for row, value in enumerate(values) if value is None), None)
        if empty is not None:
            raise DataError(f"{self.place(empty, name)}: no value")
        return values

    def texts(self, name: str) -> list[str]:
        """A column of texts. Raises: DataError for an empty one, or one that is not text."""
        values = self.column(name)
        for row, value in enumerate(values):
            if not isinstance(value, str):
                raise DataError(f"{self.place(row, name)}: got {_brief(value)}, accepted is text")
            if not is_text(value):
                raise DataError(f"{self.place(row, name)}: {_brief(value)} is no valid Unicode")
            if not value or value.isspace():
                raise DataError(f"{self.place(row, name)}: the text is empty")
        return values

    def take(self, rows: Sequence[int]) -> Rows:
        """The given rows, in the given order."""
        columns = {name: [values[i] for i in rows] for name, values in self.columns.items()}
        return Rows(self.source, columns, [self.lines[i] for i in rows], self.unit, self.classes, self.running)


def read_rows(
    path: str | Path,
    *,
    columns: Sequence[str] | None = None,
    limit: int | None = None,
    format: str | None = None,
) -> Rows:
    """Read a local tsv, csv, jsonl, json, parquet, conll or txt file, or a .gz of these.

    Args:
        columns: names for a file without a header line (a first line equal to them is taken for a header).
        limit: read the first `limit` rows only; later lines are not looked at.
        format: one of the formats above where the file's name does not tell it.

    Values are texts for tsv, csv, txt and conll (conll: lists of texts) and typed for the others. An object
    without one of the keys has None there, which `Rows.column` refuses.

    Raises:
        DataError: no such file, an empty file, a header without rows, a row with too many or too few fields,
            malformed JSON or CSV, a byte that is not UTF-8, a damaged gzip file, a column named twice.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "data.tsv"
        >>> _ = path.write_text("sentence\\tlabel\\na fine film\\t1\\n")
        >>> read_rows(path).columns
        {'sentence': ['a fine film'], 'label': ['1']}
    """
    path = Path(path).expanduser()
    kind = format or file_format(path)
    source = str(path)
    if not path.exists():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"{source}: no such data file{near(path.name, beside)}")
    if path.is_dir():
        raise DataError(f"{source}: is a folder, accepted is a file ({', '.join(FORMATS)}, or .gz of these)")
    if not path.is_file():
        raise DataError(f"{source}: is no regular file, accepted is a file ({', '.join(FORMATS)}, or .gz of these)")
    try:
        with opened(path) as file:
            if kind == "parquet":
                rows = _read_parquet(file, source, limit)
            else:
                rows = _READERS[kind](_lines(file, source), source, columns, limit)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{source}: damaged gzip file: {error}") from None
    except OSError as error:
        raise DataError(f"{source}: cannot be read: {error.strerror or error}") from None
    if columns is not None and kind in ("jsonl", "json", "parquet") and set(columns) - set(rows.columns):
        rows.column(min(set(columns) - set(rows.columns)))
    return rows


def file_format(path: Path) -> str:
    """The format a file's name tells. Raises: DataError when it tells none."""
    suffixes = [s.lower().lstrip(".") for s in path.suffixes]
    kind = suffixes[-2] if len(suffixes) > 1 and suffixes[-1] == "gz" else (suffixes or [""])[-1]
    kind = {"json5": "", "ndjson": "jsonl", "bio": "conll", "iob": "conll", "text": "txt"}.get(kind, kind)
    if kind not in FORMATS:
        raise DataError(
            f"{path}: the name tells no known format; accepted are {', '.join(FORMATS)} and .gz of these, "
            f"or say it in the data section, as in format: tsv"
        )
    return kind


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """A file's bytes, unpacked where they are a gzip archive."""
    with open(path, "rb") as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        if zipped:
            with gzip.open(raw, "rb") as file:
                most = max(_UNPACKED_BYTES, _UNPACKED_RATIO * path.stat().st_size)
                yield io.BufferedReader(_Limited(file, str(path), most), 2**20)
        else:
            yield raw


class _Limited(io.RawIOBase):
    """An unpacked archive, up to a number of bytes."""

    def __init__(self, file: gzip.GzipFile, source: str, most: int):
        self.file, self.source, self.most, self.left = file, source, most, most

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self.file.readinto(buffer)
        self.left -= count
        if self.left < 0:
            raise DataError(
                f"{self.source}: unpacks to more than {self.most:,} bytes, {_UNPACKED_RATIO} times its size, which no "
                f"text does; unpack it if it is what it should be"
            )
        return count


def _lines(file: IO[bytes], source: str) -> Iterator[str]:
    """Lines with their newline, decoded strictly, without a byte order mark."""
    offset = 0
    for number, raw in enumerate(file, 1):
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            byte, at = raw[error.start], offset + error.start
            raise DataError(
                f"{source}, line {number}: byte {byte:#04x} at offset {at} is not UTF-8; convert the file, "
                f"as in iconv -f latin1 -t utf-8"
            ) from None
        offset += len(raw)
        yield line.removeprefix("\ufeff") if number == 1 else line


def _table(
    records: Iterable[tuple[int, list[str]]], source: str, columns: Sequence[str] | None, limit: int | None
) -> Rows:
    records = iter(records)
    number, first = next(records, (0, None))
    while first is not None and not first:
        number, first = next(records, (0, None))
    if first is None:
        raise DataError(f"{source}: the file is empty")
    names = list(columns) if columns is not None else first
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        where = "data.columns" if columns is not None else f"{source}, line {number}"
        raise DataError(f"{where}: column {twice[0]!r} is named {Counter(names)[twice[0]]} times")
    kept: list[list[str]] = []
    lines: list[int] = []
    if columns is not None and first != names:
        records = _chained((number, first), records)
    width, blank = len(names), 0
    for number, record in records:
        if blank:
            raise DataError(f"{source}, line {blank}: the line is empty, expected {width} fields")
        if len(record) != width:
            if not record:
                blank = blank or number  # an error only when rows follow
                continue
            many = "many" if len(record) > width else "few"
            last = f"{names[-1]!r} is the last column" if many == "many" else f"{names[len(record)]!r} is missing"
            raise DataError(
                f"{source}, line {number}: too {many} fields: got {len(record)}, expected {width} "
                f"({', '.join(names)}); {last}"
            )
        kept.append(record)
        lines.append(number)
        if len(kept) == limit:
            break
    if not kept:
        raise DataError(f"{source}: the file has a header ({', '.join(names)}) but no rows")
    return Rows(source, dict(zip(names, (list(c) for c in zip(*kept)))), lines)


def _chained(first: tuple[int, list[str]], rest: Iterator) -> Iterator:
    yield first
    yield from rest


def _read_tsv(lines: Iterator[str], source: str, columns: Sequence[str] | None, limit: int | None) -> Rows:
    stripped = ((number, line.rstrip("\r\n")) for number, line in enumerate(lines, 1))
    records = ((number, line.split("\t") if line else []) for number, line in stripped)
    return _table(records, source, columns, limit)


def _read_csv(lines: Iterator[str], source: str, columns: Sequence[str] | None, limit: int | None) -> Rows:
    def records() -> Iterator[tuple[int, list[str]]]:
        reader = csv.reader(lines, strict=True)
        while True:
            number = reader.line_num + 1
            try:
                record = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                why = "a quote is opened and never closed" if "end of data" in str(error) else str(error)
                raise DataError(f"{source}, line {number}: not valid CSV: {why}") from None
            yield number, record

    previous = csv.field_size_limit(_LONGEST_FIELD)
    try:
        return _table(records(), source, columns, limit)
    finally:
        csv.field_size_limit(previous)


def _objects(objects: Iterable[tuple[int, Any]], source: str, limit: int | None) -> Rows:
    kept: list[dict] = []
    lines: list[int] = []
    names: dict[str, None] = {}
    for number, item in objects:
        if not isinstance(item, dict):
            raise DataError(f"{source}, line {number}: got {_brief(item)}, accepted is an object with named columns")
        names.update(dict.fromkeys(item))
        kept.append(item)
        lines.append(number)
        if len(kept) == limit:
            break
    if not kept:
        raise DataError(f"{source}: the file is empty")
    return Rows(source, {name: [item.get(name) for item in kept] for name in names}, lines)


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    item = dict(pairs)
    if len(item) != len(pairs):
        twice = next(k for k, count in Counter(k for k, _ in pairs).items() if count > 1)
        raise ValueError(f"key {twice!r} is given twice")
    return item


def _read_jsonl(lines: Iterator[str], source: str, columns: Sequence[str] | None, limit: int | None) -> Rows:
    decoder = json.JSONDecoder(object_pairs_hook=_pairs)

    def objects() -> Iterator[tuple[int, Any]]:
        for number, line in enumerate(lines, 1):
            if line.isspace():
                continue
            try:
                yield number, decoder.decode(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{source}, line {number}: not valid JSON: {error.msg} at column {error.colno}"
                ) from None
            except (ValueError, RecursionError) as error:
                raise DataError(f"{source}, line {number}: {error}") from None

    return _objects(objects(), source, limit)


def _read_json(lines: Iterator[str], source: str, columns: Sequence[str] | None, limit: int | None) -> Rows:
    text = "".join(lines)
    if not text or text.isspace():
        raise DataError(f"{source}: the file is empty")
    decoder = json.JSONDecoder(object_pairs_hook=_pairs)

    def skip(at: int) -> int:
        while at < len(text) and text[at] in " \t\r\n":
            at += 1
        return at

    def objects() -> Iterator[tuple[int, Any]]:
        at, number, counted = skip(0), 1, 0
        if text[at] != "[":
            raise DataError(f"{source}: accepted is a list of objects, the file begins with {text[at : at + 10]!r}")
        at = skip(at + 1)
        while text[at : at + 1] != "]":
            number, counted = number + text.count("\n", counted, at), at
            try:
                item, at = decoder.raw_decode(text, at)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{source}, line {error.lineno}: not valid JSON: {error.msg} at column {error.colno}"
                ) from None
            except (ValueError, RecursionError) as error:
                raise DataError(f"{source}, line {number}: {error}") from None
            yield number, item
            at = skip(at)
            if text[at : at + 1] == ",":
                at = skip(at + 1)
            elif text[at : at + 1] != "]":
                line = text.count("\n", 0, at) + 1
                raise DataError(f"{source}, line {line}: not valid JSON: expected ',' or ']' after an object")

    return _objects(objects(), source, limit)


def _read_conll(lines: Iterator[str], source: str, columns: Sequence[str] | None, limit: int | None) -> Rows:
    """Token first, tag last, one a line, tab- or else space-separated; a blank line ends a sentence."""
    sentences: list[tuple[int, list[str], list[str]]] = []
    tokens: list[str] = []
    tags: list[str] = []
    start = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            if tokens:
                sentences.append((start, tokens, tags))
                tokens, tags = [], []
                if len(sentences) == limit:
                    break
            continue
        line = line.rstrip("\r\n")
        fields = line.split("\t") if "\t" in line else line.split(" ")
        if len(fields) < 2 or not fields[0].strip() or not fields[-1].strip():
            raise DataError(f"{source}, line {number}: got {line!r}, accepted is a token and its tag, tab-separated")
        start = start if tokens else number
        tokens.append(fields[0])
        tags.append(fields[-1].strip())
    if tokens:
        sentences.append((start, tokens, tags))
    if not sentences:
        raise DataError(f"{source}: the file is empty")
    numbers, all_tokens, all_tags = (list(c) for c in zip(*sentences))
    return Rows(source, {"tokens": all_tokens, "tags": all_tags}, numbers)


def _read_txt(lines: Iterator[str], source: str, columns: Sequence[str] | None, limit: int | None) -> Rows:
    kept: list[str] = []
    for line in lines:
        kept.append(line)
        if len(kept) == limit:
            break
    if not any(line.strip() for line in kept):
        raise DataError(f"{source}: the file is empty")
    return Rows(source, {"text": kept}, range(1, len(kept) + 1), running=True)


def _read_parquet(file: IO[bytes], source: str, limit: int | None) -> Rows:
    import pyarrow
    import pyarrow.parquet

    content = file.read()
    try:
        opened = pyarrow.parquet.ParquetFile(io.BytesIO(content))
        if opened.metadata.num_rows > max(_UNPACKED_BYTES, _UNPACKED_RATIO * len(content)):
            raise ValueError(f"it claims {opened.metadata.num_rows:,} rows in {len(content):,} bytes")
        table = opened.read()
        table = table if limit is None else table.slice(0, limit)
        columns = table.to_pydict() if len(set(table.column_names)) == table.num_columns else {}
    except (pyarrow.ArrowException, ValueError, OverflowError, TypeError) as error:
        raise DataError(f"{source}: not a readable parquet file: {' '.join(str(error).split())[:200]}") from None
    if not table.num_rows:
        raise DataError(f"{source}: the file has columns ({', '.join(table.column_names)}) but no rows")
    twice = [name for name, count in Counter(table.column_names).items() if count > 1]
    if twice:
        raise DataError(f"{source}: column {twice[0]!r} is named twice")
    return Rows(source, columns, range(1, table.num_rows + 1), unit="row")


_READERS = {
    "tsv": _read_tsv,
    "csv": _read_csv,
    "jsonl": _read_jsonl,
    "json": _read_json,
    "conll": _read_conll,
    "txt": _read_txt,
}


def _brief(value: Any) -> str:
    shown = repr(value)
    return f"{shown[:40]}{'...' if len(shown) > 40 else ''} ({type(value).__name__})"
