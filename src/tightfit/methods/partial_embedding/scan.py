"""Which token ids a run will use: counted in its data, required by tokenizer and model, united over ranks.

Counting follows the data as the model will see it: after truncation, with special tokens, in every column of
ids (prompts, labels, chosen and rejected answers), so that the kept rows of a reduced embedding table are
exactly the rows that a full table would have trained. Source: Partial Embedding Matrix Adaptation (arXiv
2309.08708). Deviations: its code counts the main input column only, here every column of ids counts; and
`required_ids` adds what a collator, the loss or generation can insert without the data ever showing it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from tightfit.core.errors import DataError

from . import reading

_GENERATION_LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids")


def count_ids(
    data: Any,
    *,
    tokenizer: Any = None,
    columns: str | Sequence[str] | None = None,
    max_length: int | None = None,
    vocab_size: int | None = None,
    samples: int | None = None,
    progress: bool | None = True,
    batch_size: int = 1000,
) -> np.ndarray:
    """Count how often each token id occurs in `data`; returns int64 counts of shape `(vocab_size,)`.

    Nothing in `data` is changed, the truncation and padding stored in the tokenizer are put back, and
    reading a DataLoader leaves the random state as it was. A generator is consumed: give the run a fresh one.

    Args:
        data: texts or (text, text) tuples; rows as dicts, or columns as a dict of lists; a `datasets`
            Dataset, DatasetDict (all splits) or streaming dataset; a DataLoader or any iterable of batches;
            rows of ids. Columns of ids (`input_ids`, `*_input_ids`, `prompt_ids`, ...) are counted where
            there are any, and `labels` when these are sequences of integers (-100 is skipped; the tags of
            token classification are sequences of integers too and keep a few rows more than needed).
            Otherwise text columns are tokenised; a list of strings within a row is taken as words
            (`is_split_into_words=True`).
        tokenizer: called on text with special tokens, as the run will.
        columns: the columns to read; default every column of ids, or else every column of strings. Two named
            text columns with `max_length` are truncated as a pair; unnamed ones each alone, which counts no
            less.
        max_length: truncate texts to this many tokens. Leave it out when the run cuts long texts into
            windows.
        vocab_size: rows of the embedding table; default what the tokenizer knows.
        samples: read at most this many rows of each split; needed for a stream, which has no length.
        progress: True shows a bar after two seconds, None does so in a terminal only, False never.
        batch_size: rows per step.

    Raises:
        DataError: (a ValueError) an id below 0 or not below `vocab_size`; no rows; no usable column; a stream
            without `samples`; text without a tokenizer.

    >>> count_ids([[3, 1, 1], [2]], vocab_size=5).tolist()
    [0, 2, 1, 1, 0]
    """
    size = _vocab_size(vocab_size, tokenizer)
    for name, value in (("samples", samples), ("max_length", max_length), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise DataError(f"{name} is {value}; it must be at least 1")
    columns = [columns] if isinstance(columns, str) else columns
    counts = np.zeros(size, dtype=np.int64)
    rows = 0
    with _progress_bar(progress) as bar, kept_tokenizer_state(tokenizer):
        for split, source in reading.splits(data):
            place = f" of split {split!r}" if split else ""
            start = 0
            for table in reading.tables(source, batch_size, samples, columns):
                for name, ids in reading.id_columns(table, tokenizer, columns, max_length, start, place):
                    _check_range(ids, size, f"column {name!r}{place}", start)
                    counts += np.bincount(ids.ids, minlength=size)
                read = reading.table_rows(table)
                start += read
                bar.update(read)
            rows += start
    if not rows:
        raise DataError("no rows to count: the data is empty, or an iterator that was used up before")
    return counts


def required_ids(tokenizer: Any = None, model: Any = None) -> tuple[list[int], dict[int, str]]:
    """Ids to keep whatever the data shows, ascending, and the reason for each.

    These are the special tokens (T5 sentinels and language codes among them), the ids named in the model's
    config and generation config (nested text, encoder and decoder configs too), the bytes `<0x00>`..`<0xFF>`
    of a tokenizer with byte fallback and the 256 byte symbols of byte-level BPE. Ids outside the table are
    left out.

    >>> required_ids()
    ([], {})
    """
    reasons: dict[int, str] = {}
    limit = None
    if model is not None:
        limit = model.get_input_embeddings().weight.shape[0]
        for owner in ("config", "generation_config"):
            _config_ids(getattr(model, owner, None), owner, reasons)
    if tokenizer is not None:
        limit = limit if limit is not None else _vocab_size(None, tokenizer)
        special = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens)
        reasons |= {token_id: f"special token {token!r}" for token_id, token in special if token_id is not None}
        reasons |= {token_id: why for token_id, why in byte_ids(tokenizer).items() if token_id not in reasons}
    kept = sorted(i for i in reasons if limit is None or 0 <= i < limit)
    return kept, {i: reasons[i] for i in kept}


def byte_ids(tokenizer: Any) -> dict[int, str]:
    """Ids with which a tokenizer spells any text byte by byte, and why; none where it cannot."""
    backend, vocab = getattr(tokenizer, "backend_tokenizer", None), tokenizer.get_vocab()
    prefix = suffix = ""
    if backend is None:
        falls_back, byte_level = "<0x00>" in vocab and "<0xFF>" in vocab, False
    else:
        spec = json.loads(backend.to_str())
        falls_back = bool(spec["model"].get("byte_fallback"))
        prefix = spec["model"].get("continuing_subword_prefix") or ""
        suffix = spec["model"].get("end_of_word_suffix") or ""
        byte_level = any('"ByteLevel"' in json.dumps(spec[part]) for part in ("normalizer", "pre_tokenizer"))
    found: dict[int, str] = {}
    if falls_back:
        names = (f"<0x{byte:02X}>" for byte in range(256))
        found |= {vocab[name]: f"byte fallback {name}" for name in names if name in vocab}
    if byte_level:
        from tokenizers.pre_tokenizers import ByteLevel

        for c in ByteLevel.alphabet():  # in CLIP each byte has a second symbol, for the end of a word
            forms = (c, prefix + c, c + suffix, prefix + c + suffix)
            found |= {vocab[form]: f"byte symbol {form!r}" for form in forms if form in vocab}
    return found


def union_across_ranks(ids_mask: Any) -> Any:
    """Mask (V,) of the ids that any rank keeps: an all-reduce with MAX; the mask itself in a single process.

    Takes a torch tensor or a numpy array and gives the same kind and dtype; V bytes travel.

    Raises:
        DataError: the masks differ in length across ranks.

    >>> union_across_ranks(np.array([True, False])).tolist()
    [True, False]
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return ids_mask
    on_gpu = distributed.get_backend() == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    mask = torch.as_tensor(ids_mask)
    size = torch.tensor([len(mask), -len(mask)], device=device)
    distributed.all_reduce(size, op=distributed.ReduceOp.MAX)
    longest, shortest = int(size[0]), -int(size[1])
    if longest != shortest:
        raise DataError(
            f"the masks differ in length across ranks ({shortest} to {longest}, here {len(mask)}); "
            "give every rank the same vocab_size"
        )
    merged = (mask != 0).to(device=device, dtype=torch.uint8)
    distributed.all_reduce(merged, op=distributed.ReduceOp.MAX)
    if isinstance(ids_mask, torch.Tensor):
        return merged.to(device=ids_mask.device, dtype=ids_mask.dtype)
    return merged.cpu().numpy().astype(np.asarray(ids_mask).dtype)


def _vocab_size(given: int | None, tokenizer: Any) -> int:
    if given is not None:
        if isinstance(given, bool) or not isinstance(given, (int, np.integer)) or given < 1:
            raise DataError(f"vocab_size is {given!r}; give the number of rows of the embedding table")
        return int(given)
    if tokenizer is None:
        raise DataError("neither vocab_size nor a tokenizer was given; give one, so that ids can be checked")
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))


def is_id_field(name: str) -> bool:
    """Whether a field of a config or generation config holds token ids, alone or in lists."""
    return name.endswith(("_token_id", "_token_ids", "_token_index")) or name in _GENERATION_LISTS


def is_id_table(name: str, value: Any) -> bool:
    """Whether a field of a generation config gives token ids by name (Whisper's languages and tasks)."""
    return name in ("lang_to_id", "task_to_id") and isinstance(value, dict)


def biased_sequences(value: Any) -> list[tuple[tuple[int, ...], float]]:
    """The field `sequence_bias` of a generation config, in either of its forms: (ids, bias) for each.

    >>> biased_sequences({(3, 4): -1.0}) == biased_sequences([[[3, 4], -1.0]])
    True
    """
    pairs = value.items() if isinstance(value, dict) else value or ()
    return [(tuple(sequence), bias) for sequence, bias in pairs]


def _config_ids(config: Any, place: str, reasons: dict[int, str]) -> None:
    """Collect the token ids that a config names, and those of the language configs nested in it."""
    if config is None:
        return
    for name, value in vars(config).items():
        if is_id_field(name):
            for token_id in _integers(value):
                reasons.setdefault(token_id, f"{place}.{name}")
        elif name == "forced_decoder_ids":
            for _, token_id in value or ():  # pairs of position and id
                for number in _integers(token_id):
                    reasons.setdefault(number, f"{place}.{name}")
        elif is_id_table(name, value):
            for token_id in value.values():
                for number in _integers(token_id):
                    reasons.setdefault(number, f"{place}.{name}")
        elif name == "sequence_bias":
            for sequence, _ in biased_sequences(value):
                for token_id in sequence:
                    reasons.setdefault(token_id, f"{place}.{name}")
        elif hasattr(value, "to_dict") and getattr(value, "vocab_size", None) is not None:
            _config_ids(value, f"{place}.{name}", reasons)


def _integers(value: Any) -> Iterator[int]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _integers(item)
    elif isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        yield int(value)


def _check_range(rows: reading.Ragged, size: int, where: str, start: int) -> None:
    ids = rows.ids
    if not ids.size or (ids.min() >= 0 and ids.max() < size):
        return
    at = int(np.flatnonzero((ids < 0) | (ids >= size))[0])
    raise DataError(
        f"id {ids[at]} in row {start + rows.row_of(at)}, {where}: ids must lie in 0..{size - 1} "
        f"(vocab_size {size}). Do tokenizer and model belong together?"
    )


@contextlib.contextmanager
def kept_tokenizer_state(tokenizer: Any) -> Iterator[None]:
    """Calling a tokenizer overwrites the truncation and padding stored in it; put them back."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        yield
        return
    truncation, padding = backend.truncation, backend.padding
    try:
        yield
    finally:
        backend.enable_truncation(**truncation) if truncation else backend.no_truncation()
        backend.enable_padding(**padding) if padding else backend.no_padding()


def _progress_bar(progress: bool | None) -> Any:
    from tqdm.auto import tqdm

    silent = None if progress is None else not progress  # tqdm: None is silent where stderr is no terminal
    return tqdm(desc="counting token ids", unit=" rows", delay=2, disable=silent)
