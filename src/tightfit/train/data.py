"""From a recipe file's data section to tokenised train and eval sets with their collator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tightfit.core.errors import DataError
from tightfit.train.encode import (
    build_dataset,
    check_fast,
    check_length,
    encode_texts,
    fingerprint,
    required_column,
    token_lists,
    truncation_note,
)
from tightfit.train.labels import class_labels, class_name, is_regression, ordered, regression_labels, unseen
from tightfit.train.sources import DEMO, read_sources, split_off

if TYPE_CHECKING:
    from datasets import Dataset

    from tightfit.train.recipe_file import RecipeFile
    from tightfit.train.rows import Rows

IGNORED = -100


@dataclass(frozen=True)
class TaskData:
    """Tokenised data of one task."""

    task: str
    train: Dataset
    eval: Dataset
    collator: Callable[[list[dict]], dict]
    fingerprint: str  # sha256 of the raw rows, train and eval
    label_names: tuple[str, ...] | None = None  # classes or tags in the order of their ids
    num_labels: int | None = None
    problem_type: str | None = None  # "regression", "single_label_classification" or None
    train_texts: list[Any] = field(default_factory=list)  # raw input of each row, for reports
    eval_texts: list[Any] = field(default_factory=list)
    notes: tuple[str, ...] = ()  # what a user should know: truncated rows, how eval was split off
    extra: dict[str, Any] = field(default_factory=dict)  # what the task's metrics need besides


def load_data(file: RecipeFile, tokenizer: Any) -> TaskData:
    """Read, check and tokenise both sets; padding is left to the collator.

    No row is dropped: a bad row is an error that names it, a row longer than `train.max_length` is cut and
    counted in `TaskData.notes`. Without eval data a fixed random part of the training rows is held out, the
    same for every seed and recipe.

    Args:
        tokenizer: the model's tokenizer, or its image processor for image-classification.

    Raises:
        DataError: a file, row, column or label that cannot be used; the message names it.
        RecipeError: the task needs a key of the data section that is not given.
    """
    from tightfit.train.images import load_images
    from tightfit.train.language import load_causal, load_seq2seq
    from tightfit.train.question_answering import load_questions

    loaders = {
        "sequence-classification": load_sequences,
        "token-classification": load_tokens,
        "causal-lm": load_causal,
        "seq2seq-lm": load_seq2seq,
        "question-answering": load_questions,
        "image-classification": load_images,
    }
    found = loaders[file.task](file, tokenizer)
    if file.task in ("token-classification", "causal-lm", "seq2seq-lm"):
        _check_targets(found, file.train.max_length)
    return found


def _check_targets(data: TaskData, max_length: int) -> None:
    """Raise DataError where no token of a set is left to learn: its loss would not be a number."""
    first = 1 if data.task == "causal-lm" else 0  # nothing predicts the first token
    for split, rows in (("train", data.train), ("eval", data.eval)):
        labels = (row.as_py()[first:] for row in rows.data.column("labels"))
        if all(label == IGNORED for row in labels for label in row):
            raise DataError(
                f"train.max_length: {max_length} leaves no token with a label in the {split} rows; give more"
            )


def longest_batch(data: TaskData, batch_size: int, collator: Callable | None = None) -> dict:
    """Collate a batch of training rows at which a run's memory peaks: no shuffle makes a wider one.

    These are the longest rows, among them the longest source and the longest target where both vary. Rows of one
    length need no padding, for which models build a mask, so the last of them makes room for the shortest row there
    is. Rows of equal length keep their order; fewer rows than `batch_size` give a smaller batch.
    """
    import numpy as np
    import pyarrow.compute as compute

    lengths: dict[str, np.ndarray] = {}
    for name in ("input_ids", "labels"):
        if name in data.train.column_names:
            column = data.train.data.column(name)
            if str(column.type).startswith(("list", "large_list")):
                lengths[name] = compute.list_value_length(column).to_numpy().astype(np.int64)
    order = np.argsort(-sum(lengths.values(), np.zeros(len(data.train), dtype=np.int64)), kind="stable")
    widest = {int(length.argmax()) for length in lengths.values()} if batch_size > 1 else set()
    rows = list(dict.fromkeys([*sorted(widest), *map(int, order)]))[:batch_size]
    sources = lengths.get("input_ids")
    if sources is not None and len(rows) > max(1, len(widest)) and len({*sources[rows], sources.min()}) == 2:
        rows[-1] = int(sources.argmin())
    return dict((collator or data.collator)([data.train[row] for row in rows]))


def load_sequences(file: RecipeFile, tokenizer: Any) -> TaskData:
    """Rows of sequence-classification: one or two texts and a class, or a number (regression)."""
    from transformers import DataCollatorWithPadding

    train, held_out, notes = read_sources(file.data)
    demo = file.data.train == DEMO
    fields = file.data.text or (["text"] if demo else required_column(file, "text", train))
    check_length(tokenizer, file.train.max_length, pair=len(fields) > 1)
    label = file.data.label or ("package" if demo else required_column(file, "label", train))
    columns = [train.column(label)] + ([held_out.column(label)] if held_out else [])
    regression = file.data.regression
    if regression is None:
        regression = label not in train.classes and is_regression(*columns)
        if regression:
            notes.append(f"{label!r} holds decimal numbers, to be predicted; data.regression: false makes them classes")
    if held_out is None:
        strata = None if regression else [class_name(v, train, i, label) for i, v in enumerate(columns[0])]
        train, held_out, note = split_off(train, file.data.eval_fraction, file.data.eval_rows, strata)
        notes.append(note)
    labels = (regression_labels if regression else class_labels)(train, held_out, label)
    texts = {split: [rows.texts(name) for name in fields] for split, rows in (("train", train), ("eval", held_out))}
    mark = fingerprint(file.task, texts["train"], labels.train, texts["eval"], labels.eval, labels.names)
    sets = {}
    for split, targets in (("train", labels.train), ("eval", labels.eval)):
        cut = 0

        def encode(rows: range, split: str = split, targets: list = targets) -> dict[str, list]:
            nonlocal cut
            parts = [[column[i] for i in rows] for column in texts[split]]
            encoded, batch_cut = encode_texts(
                tokenizer, parts[0], parts[1] if len(parts) > 1 else None, file.train.max_length
            )
            cut += batch_cut
            return {**encoded, "labels": [targets[i] for i in rows]}

        sets[split] = build_dataset(len(targets), encode, f"tokenising {split} rows", mark)
        notes += truncation_note(split, cut, len(targets), file.train.max_length)
    return TaskData(
        task=file.task,
        train=sets["train"],
        eval=sets["eval"],
        collator=DataCollatorWithPadding(tokenizer),
        fingerprint=mark,
        label_names=labels.names,
        num_labels=len(labels.names) if labels.names else 1,
        problem_type="regression" if regression else "single_label_classification",
        train_texts=_joined(texts["train"]),
        eval_texts=_joined(texts["eval"]),
        notes=tuple(notes),
    )


def load_tokens(file: RecipeFile, tokenizer: Any) -> TaskData:
    """Rows of token-classification: tokens and tags, from CoNLL files or columns of lists.

    A word's first piece carries its tag, further pieces are ignored by the loss (-100).
    """
    from transformers import DataCollatorForTokenClassification

    check_fast(tokenizer, file.task)
    check_length(tokenizer, file.train.max_length)
    train, held_out, notes = read_sources(file.data)
    conll = set(train.columns) == {"tokens", "tags"}
    tokens_column = (file.data.text or (["tokens"] if conll else required_column(file, "text", train)))[0]
    tags_column = file.data.tags or ("tags" if conll else required_column(file, "tags", train))
    one_source = held_out is None
    if held_out is None:
        train, held_out, note = split_off(train, file.data.eval_fraction, file.data.eval_rows)
        notes.append(note)
    words, tags = {}, {}
    for split, rows in (("train", train), ("eval", held_out)):
        words[split] = token_lists(rows, tokens_column)
        tags[split] = _tag_names(rows, tags_column, words[split])
    seen = {tag for row in tags["train"] + (tags["eval"] if one_source else []) for tag in row}
    names = train.classes.get(tags_column) or _tag_order(seen)
    for row, row_tags in enumerate(tags["eval"]):
        for tag in row_tags:
            if tag not in seen:
                raise DataError(unseen(tag, held_out.place(row, tags_column), train.source, names))
    ids = {name: i for i, name in enumerate(names)}
    mark = fingerprint(file.task, words["train"], tags["train"], words["eval"], tags["eval"])
    sets = {}
    for split in ("train", "eval"):
        lost = cut = 0

        def encode(rows: range, split: str = split) -> dict[str, list]:
            nonlocal lost, cut
            batch = [words[split][i] for i in rows]
            encoded = tokenizer(batch, is_split_into_words=True, truncation=True, max_length=file.train.max_length)
            labels = []
            for position, i in enumerate(rows):
                word_ids = encoded.word_ids(position)
                labels.append(_first_piece_labels(word_ids, [ids[tag] for tag in tags[split][i]]))
                last = max((w for w in word_ids if w is not None), default=-1)
                full = len(word_ids) >= file.train.max_length
                cut += full and last + 1 < len(batch[position])
                lost += len(batch[position]) - len({w for w in word_ids if w is not None})
            return {**encoded, "labels": labels}

        sets[split] = build_dataset(len(words[split]), encode, f"tokenising {split} rows", mark)
        notes += truncation_note(split, cut, len(words[split]), file.train.max_length)
        if lost:
            notes.append(f"{lost} {split} words lie beyond the cut or have no token; their tags are not used")
    return TaskData(
        task=file.task,
        train=sets["train"],
        eval=sets["eval"],
        collator=DataCollatorForTokenClassification(tokenizer, label_pad_token_id=IGNORED),
        fingerprint=mark,
        label_names=names,
        num_labels=len(names),
        train_texts=[" ".join(row) for row in words["train"]],
        eval_texts=[" ".join(row) for row in words["eval"]],
        notes=tuple(notes),
    )


def _first_piece_labels(word_ids: list[int | None], tags: list[int]) -> list[int]:
    labels, previous = [], None
    for word in word_ids:
        labels.append(IGNORED if word is None or word == previous else tags[word])
        previous = word
    return labels


def _tag_names(rows: Rows, column: str, words: list[list[str]]) -> list[list[str]]:
    names = []
    for row, value in enumerate(rows.column(column)):
        if not isinstance(value, list | tuple) or len(value) != len(words[row]):
            given = f"{len(value)} tags" if isinstance(value, list | tuple) else repr(value)
            raise DataError(f"{rows.place(row, column)}: got {given} for {len(words[row])} tokens")
        names.append([class_name(tag, rows, row, column) for tag in value])
    return names


def _tag_order(tags: set[str]) -> tuple[str, ...]:
    """`O` first, the rest sorted."""
    return ("O", *ordered(tags - {"O"})) if "O" in tags else ordered(tags)


def _joined(columns: list[list[str]]) -> list[Any]:
    return columns[0] if len(columns) == 1 else list(zip(*columns))
