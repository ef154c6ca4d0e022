"""Tokenised rows: batched tokenisation into Arrow columns, with every truncation counted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tightfit.core.documents import is_text
from tightfit.core.errors import DataError, RecipeError
from tightfit.train.progress import progress
from tightfit.train.recipe_file import RecipeFile
from tightfit.train.rows import Rows

if TYPE_CHECKING:
    from datasets import Dataset

BATCH_ROWS = 1000


def build_dataset(
    count: int, encode: Callable[[range], dict[str, list]], description: str, fingerprint: str
) -> Dataset:
    """A data set of `encode(rows)` over batches of row numbers, held in Arrow memory, no cache on disk."""
    import pyarrow
    from datasets import Dataset

    tables = []
    starts = range(0, count, BATCH_ROWS)
    for start in progress(starts, len(starts), description):
        columns = encode(range(start, min(start + BATCH_ROWS, count)))
        tables.append(pyarrow.table({name: pyarrow.array(values) for name, values in columns.items()}))
    return Dataset(pyarrow.concat_tables(tables), fingerprint=fingerprint[:32])


def encode_texts(
    tokenizer: Any, texts: Sequence[str], seconds: Sequence[str] | None, max_length: int
) -> tuple[dict[str, list], int]:
    """Tokenise single texts or pairs, cut at `max_length` (pairs: the longer text first).

    Returns:
        the tokenizer's columns as lists, and how many rows were cut.
    """
    pair = (list(texts),) if seconds is None else (list(texts), list(seconds))
    encoded = dict(tokenizer(*pair, truncation=True, max_length=max_length))
    full = [row for row, ids in enumerate(encoded["input_ids"]) if len(ids) >= max_length]
    if not full:
        return encoded, 0
    uncut = tokenizer(*([column[row] for row in full] for column in pair), truncation=False, verbose=False)
    return encoded, sum(len(ids) > max_length for ids in uncut["input_ids"])


def fingerprint(*parts: Any) -> str:
    """sha256 over raw values (texts, labels), independent of tokenizer and process."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(json.dumps(part, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass"))
        digest.update(b"\0")
    return digest.hexdigest()


def required_column(file: RecipeFile, key: str, rows: Rows) -> Any:
    """The column(s) named by `data.<key>`. Raises: RecipeError listing the file's columns when not given."""
    value = getattr(file.data, key)
    if value is None:
        likely = {"text": "[text]", "label": "label", "target": "target", "tags": "tags"}[key]
        raise RecipeError(
            f"data.{key}: task {file.task} needs it, as in {key}: {likely}; "
            f"{rows.source} has the columns {', '.join(map(repr, rows.columns))}"
        )
    return value


def token_lists(rows: Rows, column: str) -> list[list[str]]:
    """A column of token lists. Raises: DataError for an empty list or a token that is no text."""
    values = rows.column(column)
    for row, value in enumerate(values):
        if not isinstance(value, list | tuple) or not all(map(is_text, value)):
            raise DataError(f"{rows.place(row, column)}: got {type(value).__name__}, accepted is a list of texts")
        if not value:
            raise DataError(f"{rows.place(row, column)}: the list is empty")
    return [list(value) for value in values]


def check_length(tokenizer: Any, length: int, *, pair: bool = False, key: str = "max_length") -> None:
    """Raise RecipeError for a length that the tokenizer's own tokens fill; it would cut nothing below that."""
    added = tokenizer.num_special_tokens_to_add(pair=pair)
    if length <= added:
        raise RecipeError(f"train.{key}: got {length}, accepted is more than the {added} tokens added to each row")


def truncation_note(split: str, cut: int, count: int, max_length: int) -> list[str]:
    """What to tell the user about cut rows; nothing when none was cut."""
    if not cut:
        return []
    return [f"{cut} of {count} {split} rows are longer than train.max_length {max_length} tokens and were cut"]


def check_fast(tokenizer: Any, task: str) -> None:
    """Raise RecipeError when the tokenizer cannot map tokens back to the text."""
    if not getattr(tokenizer, "is_fast", False):
        raise RecipeError(f"task {task} needs a fast tokenizer (tokenizer.json), got {type(tokenizer).__name__}")
