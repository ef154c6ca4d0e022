"""Data of the language-model tasks: causal-lm (running text, single texts, prompts) and seq2seq-lm."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tightfit.core.errors import DataError, RecipeError
from tightfit.train.encode import (
    build_dataset,
    check_length,
    encode_texts,
    fingerprint,
    required_column,
    truncation_note,
)
from tightfit.train.sources import read_sources, split_off, split_tail

if TYPE_CHECKING:
    from tightfit.train.data import TaskData
    from tightfit.train.recipe_file import RecipeFile
    from tightfit.train.rows import Rows

IGNORED = -100
_CHUNK_LINES = 2000


def load_causal(file: RecipeFile, tokenizer: Any) -> TaskData:
    """Rows of causal-lm, in one of three shapes.

    - packed (default for .txt): the joined texts, an end token between documents, cut into contiguous blocks
      of `train.max_length` tokens; the last block is shorter, nothing is dropped;
    - one row a text, cut at `train.max_length`, an end token added;
    - with `data.target`: prompt, newline, target, end token; the loss is on the target only. A row that is
      too long loses the beginning of its prompt.
    """
    from tightfit.train.data import TaskData

    train, held_out, notes = read_sources(file.data)
    running = train.running
    packed = file.data.packed if file.data.packed is not None else running
    if file.data.target is not None and packed:
        raise RecipeError("data.packed: true cannot stand with data.target; leave one of them out")
    fields = file.data.text or (["text"] if running else required_column(file, "text", train))
    if held_out is None:
        if running and packed:
            train, held_out, note = split_tail(train, file.data.eval_fraction, file.data.eval_rows)
        else:
            train, held_out, note = split_off(train, file.data.eval_fraction, file.data.eval_rows)
        notes.append(note)
    texts, targets, sets = {}, {}, {}
    for split, rows in (("train", train), ("eval", held_out)):
        texts[split] = rows.columns["text"] if rows.running else _texts(rows, fields)
        if rows.running and not packed:
            texts[split] = [line for line in texts[split] if line.strip()]
        targets[split] = rows.texts(file.data.target) if file.data.target else None
    mark = fingerprint(file.task, texts["train"], targets["train"], texts["eval"], targets["eval"])
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    length = file.train.max_length
    for split, rows in (("train", train), ("eval", held_out)):
        if packed:
            blocks = list(_blocks(tokenizer, _documents(texts[split], rows.running), end, length))
            if not blocks:
                raise DataError(f"{rows.source}: the model's tokenizer makes no token of the {split} text")
            if len(blocks[-1]) == 1 and len(blocks) > 1:
                blocks.pop()
                notes.append(f"the very last token of the {split} text stands alone and predicts nothing; left out")
            sets[split] = _id_dataset(blocks, [list(b) for b in blocks], split, mark)
            continue
        source, wanted = texts[split], targets[split]
        if wanted is None:
            ids, cut = _single(tokenizer, source, end, length)
            labels = [list(row) for row in ids]
        else:
            ids, labels, cut = _prompted(tokenizer, source, wanted, end, length)
        sets[split] = _id_dataset(ids, labels, split, mark)
        notes += truncation_note(split, cut, len(source), length)
    return TaskData(
        task=file.task,
        train=sets["train"],
        eval=sets["eval"],
        collator=_collator(tokenizer),
        fingerprint=mark,
        train_texts=texts["train"],
        eval_texts=texts["eval"],
        notes=tuple(notes),
    )


def load_seq2seq(file: RecipeFile, tokenizer: Any) -> TaskData:
    """Rows of seq2seq-lm: `data.text` is the source, `data.target` the text to produce."""
    from tightfit.train.data import TaskData

    train, held_out, notes = read_sources(file.data)
    fields = required_column(file, "text", train)
    target = required_column(file, "target", train)
    if held_out is None:
        train, held_out, note = split_off(train, file.data.eval_fraction, file.data.eval_rows)
        notes.append(note)
    length = file.train.max_length
    target_length = file.train.max_target_length or length
    check_length(tokenizer, length)
    check_length(tokenizer, target_length, key="max_target_length" if file.train.max_target_length else "max_length")
    texts, targets, sets = {}, {}, {}
    for split, rows in (("train", train), ("eval", held_out)):
        texts[split], targets[split] = _texts(rows, fields), rows.texts(target)
    mark = fingerprint(file.task, texts["train"], targets["train"], texts["eval"], targets["eval"])
    for split in ("train", "eval"):
        cut = target_cut = 0

        def encode(rows: range, split: str = split) -> dict[str, list]:
            nonlocal cut, target_cut
            encoded, batch_cut = encode_texts(tokenizer, [texts[split][i] for i in rows], None, length)
            labels, batch_target_cut = _encode_targets(tokenizer, [targets[split][i] for i in rows], target_length)
            cut, target_cut = cut + batch_cut, target_cut + batch_target_cut
            return {**encoded, "labels": labels}

        sets[split] = build_dataset(len(texts[split]), encode, f"tokenising {split} rows", mark)
        notes += truncation_note(split, cut, len(texts[split]), length)
        notes += truncation_note(f"{split} target", target_cut, len(texts[split]), target_length)
    return TaskData(
        task=file.task,
        train=sets["train"],
        eval=sets["eval"],
        collator=_collator(tokenizer),
        fingerprint=mark,
        train_texts=texts["train"],
        eval_texts=texts["eval"],
        notes=tuple(notes),
        extra={"eval_targets": targets["eval"]},
    )


def _collator(tokenizer: Any) -> Any:
    from transformers import DataCollatorForSeq2Seq

    return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)


def _texts(rows: Rows, fields: list[str]) -> list[str]:
    columns = [rows.texts(name) for name in fields]
    return columns[0] if len(columns) == 1 else ["\n".join(parts) for parts in zip(*columns)]


def _documents(texts: list[str], running: bool) -> Iterator[tuple[str, bool]]:
    """Pieces of text to tokenise, each with whether a document ends after it."""
    if not running:
        yield from ((text, True) for text in texts)
        return
    for start in range(0, len(texts), _CHUNK_LINES):
        yield "".join(texts[start : start + _CHUNK_LINES]), False


def _blocks(tokenizer: Any, pieces: Iterator[tuple[str, bool]], end: list[int], length: int) -> Iterator[list[int]]:
    pending: list[int] = []
    for text, last in pieces:
        pending += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        pending += end if last else []
        cut = len(pending) - len(pending) % length
        yield from (pending[i : i + length] for i in range(0, cut, length))
        pending = pending[cut:]
    if pending:
        yield pending


def _single(tokenizer: Any, texts: list[str], end: list[int], length: int) -> tuple[list[list[int]], int]:
    rows, cut = [], 0
    for ids in _tokenised(tokenizer, [text.rstrip("\r\n") for text in texts], add_special_tokens=True):
        ids = ids if not end or ids[-1:] == end else ids + end
        cut += len(ids) > length
        rows.append(ids[:length])
    return rows, cut


def _prompted(
    tokenizer: Any, prompts: list[str], targets: list[str], end: list[int], length: int
) -> tuple[list[list[int]], list[list[int]], int]:
    rows, labels, cut = [], [], 0
    prompt_ids = _tokenised(tokenizer, [p + "\n" for p in prompts], add_special_tokens=True)
    target_ids = _tokenised(tokenizer, targets, add_special_tokens=False)
    for prompt, target in zip(prompt_ids, target_ids):
        prompt = prompt[:-1] if end and prompt[-1:] == end else prompt
        target = target + end
        cut += len(prompt) + len(target) > length
        target = target[: length - 1]
        prompt = prompt[len(prompt) - min(len(prompt), length - len(target)) :]
        rows.append(prompt + target)
        labels.append([IGNORED] * len(prompt) + target)
    return rows, labels, cut


def _tokenised(tokenizer: Any, texts: list[str], **options: Any) -> list[list[int]]:
    return [] if not texts else list(tokenizer(texts, verbose=False, **options)["input_ids"])


def _encode_targets(tokenizer: Any, targets: list[str], length: int) -> tuple[list[list[int]], int]:
    ids = tokenizer(text_target=targets, truncation=True, max_length=length)["input_ids"]
    full = [row for row, row_ids in enumerate(ids) if len(row_ids) >= length]
    uncut = tokenizer(text_target=[targets[i] for i in full], verbose=False)["input_ids"] if full else []
    return ids, sum(len(row_ids) > length for row_ids in uncut)


def _id_dataset(ids: list[list[int]], labels: list[list[int]], split: str, mark: str) -> Any:
    def encode(rows: range) -> dict[str, list]:
        return {"input_ids": [ids[i] for i in rows], "labels": [labels[i] for i in rows]}

    return build_dataset(len(ids), encode, f"collecting {split} rows", mark)
