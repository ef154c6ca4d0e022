"""Data files from elsewhere: rows, or one error that names the file; never a hang, and no memory beyond a bound."""

from __future__ import annotations

import gzip
import io
import json

import pyarrow
import pyarrow.parquet
import pytest
from fuzzing import ANYTHING, amounts, bounded, changed_documents, damaged_bytes, draw_cases, works_or_is_refused
from hypothesis import strategies as st
from tiny_models import wordpiece

import tightfit
from tightfit.train import rows
from tightfit.train.data import load_data
from tightfit.train.recipe_file import RecipeFile

ROWS = {
    "sequence-classification": [
        {"text": "a fine film", "label": "good", "score": 0.5},
        {"text": "a dull plot", "label": "bad", "score": 0.1},
        {"text": "not very bad", "label": "good", "score": 1.0},
    ],
    "token-classification": [
        {"text": ["a", "fine", "film"], "tags": ["O", "B", "I"]},
        {"text": ["the", "dog"], "tags": ["O", "B"]},
        {"text": ["the", "fox"], "tags": ["O", "B"]},
    ],
    "causal-lm": [{"text": "a fine film"}, {"text": "the dull plot"}, {"text": "was good"}],
    "seq2seq-lm": [{"text": "a fine film", "target": "good"}, {"text": "the dull plot", "target": "bad"}] * 2,
    "question-answering": [
        {
            "question": "was it good",
            "context": "the film was good",
            "answers": {"text": ["good"], "answer_start": [13]},
        },
        {"question": "was it bad", "context": "the plot was bad", "answers": {"text": ["bad"], "answer_start": [13]}},
    ],
}
FIELDS = {
    "sequence-classification": {"text": ["text"], "label": "label"},
    "token-classification": {"text": ["text"], "tags": "tags"},
    "causal-lm": {"text": ["text"]},
    "seq2seq-lm": {"text": ["text"], "target": "target"},
    "question-answering": {},
}


def jsonl(items) -> bytes:
    return "".join(json.dumps(item) + "\n" for item in items).encode()


def csv(items) -> bytes:
    lines = [",".join(items[0]), *(",".join(f'"{value}"' for value in item.values()) for item in items)]
    return ("\n".join(lines) + "\n").encode()


def parquet(items) -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(items), out)
    return out.getvalue()


def recipe(task, path, **fields):
    data = {"train": str(path), "eval": str(path), **FIELDS[task], **fields}
    return RecipeFile(model="unused", task=task, data=data, output="out")


@pytest.fixture(scope="module")
def tokenizer():
    found = wordpiece()
    found.model_max_length = 128
    return found


def reads(task, path, content, tokenizer, **fields):
    path.write_bytes(content)
    data = works_or_is_refused(lambda: load_data(recipe(task, path, **fields), tokenizer))
    if data is not None:
        works_or_is_refused(lambda: data.collator([data.train[i] for i in range(len(data.train))]))


@pytest.mark.parametrize("task", ROWS)
def test_the_rows_are_good(task, tokenizer, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(jsonl(ROWS[task]))
    data = load_data(recipe(task, tmp_path / "rows.jsonl"), tokenizer)
    assert len(data.train) == len(ROWS[task])
    data.collator([data.train[0], data.train[1]])


@pytest.mark.parametrize("task", ROWS)
@amounts(15, 400)
def test_changed_rows(task, cases, tokenizer, tmp_path):
    def check(items):
        if isinstance(items, list):
            reads(task, tmp_path / "rows.jsonl", jsonl(items), tokenizer)

    draw_cases(cases, changed_documents(st.just(ROWS[task])), check)


@amounts(15, 400)
def test_changed_numbers(cases, tokenizer, tmp_path):
    def check(value):
        items = [{**item, "score": value if i == 1 else item["score"]} for i, item in enumerate(ROWS[task])]
        reads(task, tmp_path / "rows.jsonl", jsonl(items), tokenizer, label="score", regression=True)

    task = "sequence-classification"
    draw_cases(cases, ANYTHING, check)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet", "conll", "txt"])
@amounts(15, 600)
def test_damaged_files(kind, cases, tokenizer, tmp_path):
    task = {"conll": "token-classification", "txt": "causal-lm"}.get(kind, "sequence-classification")
    items = ROWS[task]
    content = {
        "jsonl": jsonl(items),
        "json": json.dumps(items, indent=1).encode(),
        "csv": csv(items),
        "tsv": b"text\tlabel\na fine film\tgood\na dull plot\tbad\n",
        "parquet": parquet(items),
        "conll": b"a\tO\nfilm\tB\n\nthe\tO\ndog\tB\n\nfox\tB\n",
        "txt": b"a fine film\nthe dull plot\n",
    }[kind]
    fields = {"tags": None, "text": None} if kind == "conll" else {}

    def check(content):
        reads(task, tmp_path / f"rows.{kind}", content, tokenizer, **fields)

    draw_cases(cases, damaged_bytes(st.just(content)), check)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@amounts(10, 400)
def test_damaged_archives(kind, cases, tokenizer, tmp_path):
    content = gzip.compress({"jsonl": jsonl, "parquet": parquet}[kind](ROWS["sequence-classification"]))

    def check(content):
        reads("sequence-classification", tmp_path / f"rows.{kind}.gz", content, tokenizer)

    draw_cases(cases, damaged_bytes(st.just(content)), check)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json", "parquet", "txt"])
def test_an_archive_that_swells_is_refused(kind, tmp_path, monkeypatch):
    """Tens of KiB that unpack to 16 MiB, where 4 MiB are allowed."""
    monkeypatch.setattr(rows, "_UNPACKED_BYTES", 2**22)
    path = tmp_path / f"rows.{kind}.gz"
    path.write_bytes(gzip.compress(b"[" + b" " * 2**24))
    with bounded(20, 2**28), pytest.raises(tightfit.DataError, match="unpacks to more than"):
        rows.read_rows(path)


def test_a_parquet_file_with_texts_that_are_no_text(tmp_path, tokenizer):
    bad = pyarrow.array([b"\xff\xfe", b"ok"], pyarrow.binary()).view(pyarrow.string())
    table = pyarrow.table({"text": bad, "label": ["a", "b"]})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(tightfit.DataError, match=r"rows\.parquet"):
        load_data(recipe("sequence-classification", tmp_path / "rows.parquet"), tokenizer)


@pytest.mark.parametrize("name", ["../secret.jsonl", "link.jsonl"])
def test_what_is_read_is_what_was_named(name, tmp_path):
    """Data are files the user names, also through links and parents; special files are no data."""
    (tmp_path / "in").mkdir()
    (tmp_path / "secret.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "in" / "link.jsonl").symlink_to(tmp_path / "secret.jsonl")
    assert rows.read_rows(tmp_path / "in" / name).columns == {"text": ["x"]}
    with bounded(5), pytest.raises(tightfit.DataError, match="no regular file"):
        rows.read_rows("/dev/zero", format="txt")
