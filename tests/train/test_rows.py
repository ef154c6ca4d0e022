import csv
import gzip
import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tightfit.core.errors import DataError
from tightfit.train.rows import read_rows


def write(path, content):
    data = content if isinstance(content, bytes) else content.encode("utf-8")
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def refused(path, **options):
    with pytest.raises(DataError) as caught:
        read_rows(path, **options)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_the_same_rows_from_every_format(tmp_path, suffix):
    import pyarrow
    import pyarrow.parquet

    wanted = {"text": ['say "hi", you', "naïve\u2028日本"], "label": ["1", "0"]}
    rows = [dict(zip(wanted, values)) for values in zip(*wanted.values())]
    quoted = io.StringIO()
    writer = csv.writer(quoted)
    writer.writerows([list(wanted), *zip(*wanted.values())])
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(wanted), buffer)
    contents = {
        "tsv": "\n".join("\t".join(r) for r in [list(wanted), *zip(*wanted.values())]),
        "csv": quoted.getvalue(),
        "jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n",
        "json": json.dumps(rows, indent=2),
        "parquet": buffer.getvalue(),
    }
    for kind, content in contents.items():
        read = read_rows(write(tmp_path / f"data.{kind}{suffix}", content))
        assert read.columns == wanted, kind


def test_line_ends_and_byte_order_marks_are_no_content(tmp_path):
    rows = read_rows(write(tmp_path / "a.tsv", "\ufefftext\tlabel\r\na b\t1\r\n\r\n"))
    assert rows.columns == {"text": ["a b"], "label": ["1"]}


def test_tsv_keeps_quotes_and_csv_knows_them(tmp_path):
    assert read_rows(write(tmp_path / "a.tsv", 'a\tb\n"x\ty"\n')).columns == {"a": ['"x'], "b": ['y"']}
    rows = read_rows(write(tmp_path / "a.csv", 'a,b\n"x\n,""y""",1\nz,2\n'))
    assert rows.columns == {"a": ['x\n,"y"', "z"], "b": ["1", "2"]}
    assert list(rows.lines) == [2, 4]


def test_columns_name_a_file_without_header(tmp_path):
    path = write(tmp_path / "a.tsv", "x\t1\ny\t0\n")
    assert read_rows(path, columns=["text", "label"]).columns == {"text": ["x", "y"], "label": ["1", "0"]}
    headed = write(tmp_path / "b.tsv", "text\tlabel\nx\t1\n")
    assert len(read_rows(headed, columns=["text", "label"])) == 1
    with pytest.raises(DataError, match=r"data\.columns: column 'a' is named 2 times"):
        read_rows(path, columns=["a", "a"])


def test_limit_reads_no_further(tmp_path):
    path = write(tmp_path / "a.tsv", b"a\tb\n1\t2\n3\t4\n\xff\n")
    assert len(read_rows(path, limit=2)) == 2
    assert "not UTF-8" in refused(path, limit=3)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.tsv", "", ["is empty"]),
        ("a.tsv", "\n\n", ["is empty"]),
        ("a.tsv", "text\tlabel\n", ["header (text, label) but no rows"]),
        ("a.tsv", "a\tb\n1\t2\n1\t2\t3\n", ["line 3", "too many fields", "got 3", "expected 2", "a, b"]),
        ("a.tsv", "a\tb\n1\t2\n1\n", ["line 3", "too few fields", "'b' is missing"]),
        ("a.tsv", "a\tb\n\n1\t2\n", ["line 2", "is empty"]),
        ("a.tsv", "a\ta\n1\t2\n", ["line 1", "'a' is named 2 times"]),
        ("a.tsv", b"a\tb\n1\t2\ncaf\xe9\t1\n", ["line 3", "0xe9", "offset 11"]),
        ("a.tsv.gz", b"a\tb\n1\t2\ncaf\xe9\t1\n", ["line 3", "0xe9", "offset 11"]),
        ("a.csv", 'a,b\n"x\ny",1\n1,2,3\n', ["line 4", "too many"]),
        ("a.csv", 'a,b\n1,2\n"x,1\n', ["line 3", "never closed"]),
        ("a.csv", 'a,b\n"x"y,1\n', ["line 2", "not valid CSV"]),
        ("a.jsonl", '{"a": 1}\n{"a": \n', ["line 2", "not valid JSON"]),
        ("a.jsonl", '{"a": 1}\n[1]\n', ["line 2", "list", "object"]),
        ("a.jsonl", '{"a": 1, "a": 2}\n', ["line 1", "'a' is given twice"]),
        ("a.jsonl", "\n", ["is empty"]),
        ("a.json", '[{"a": 1},\n {"a": 2}\n {"a": 3}]', ["line 3", "expected ','"]),
        ("a.json", '[{"a": 1},\n {"a": }]', ["line 2", "not valid JSON"]),
        ("a.json", '{"a": [1]}', ["list of objects"]),
        ("a.json", '[{"a": 1}', ["expected ','"]),
        ("a.conll", "a\tO\nb\n", ["line 2", "a token and its tag"]),
        ("a.conll", "\n\t\n", ["is empty"]),
        ("a.txt", "\n \n", ["is empty"]),
        ("a.parquet", b"PAR1nonsense", ["parquet"]),
        ("a.xlsx", "x", ["no known format", "tsv, csv"]),
        ("a", "x", ["no known format"]),
    ],
)
def test_bad_files_are_named_by_line(tmp_path, name, content, words):
    message = refused(write(tmp_path / name, content))
    for word in words:
        assert word in message, message


def test_missing_files_folders_and_damaged_gzip(tmp_path):
    write(tmp_path / "train.tsv", "a\n1\n")
    assert "no such data file; did you mean 'train.tsv'?" in refused(tmp_path / "trian.tsv")
    (tmp_path / "folder.tsv").mkdir()
    assert "is a folder" in refused(tmp_path / "folder.tsv")
    packed = gzip.compress(b"a\tb\n" + b"1\t2\n" * 1000)
    (tmp_path / "cut.tsv.gz").write_bytes(packed[: len(packed) // 2])
    assert "damaged gzip" in refused(tmp_path / "cut.tsv.gz")


def test_missing_columns_values_and_empty_texts(tmp_path):
    rows = read_rows(write(tmp_path / "a.jsonl", '{"text": "x", "label": 1}\n{"text": "  "}\n'))
    with pytest.raises(DataError, match="no column 'lable'; its columns are 'text', 'label'; did you mean 'label'"):
        rows.column("lable")
    with pytest.raises(DataError, match="line 2, column 'label': no value"):
        rows.column("label")
    with pytest.raises(DataError, match="line 2, column 'text': the text is empty"):
        rows.texts("text")
    with pytest.raises(DataError, match=r"line 1, column 'label': got 1 \(int\), accepted is text"):
        read_rows(write(tmp_path / "b.jsonl", '{"label": 1}\n')).texts("label")


def test_conll_sentences(tmp_path):
    path = write(tmp_path / "a.conll", "\nAnn\tB-PER\nsings\tO\n\t\nin\tO\nRome NN\tB-LOC\n")
    rows = read_rows(path)
    assert rows.columns["tokens"] == [["Ann", "sings"], ["in", "Rome NN"]]
    assert rows.columns["tags"] == [["B-PER", "O"], ["O", "B-LOC"]] and list(rows.lines) == [2, 5]


CELL = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@given(st.integers(1, 3).flatmap(lambda n: st.lists(st.lists(CELL, min_size=n, max_size=n), min_size=1, max_size=5)))
def test_csv_round_trip(tmp_path_factory, table):
    text = io.StringIO(newline="")
    writer = csv.writer(text, quoting=csv.QUOTE_ALL)
    names = [f"c{i}" for i in range(len(table[0]))]
    writer.writerows([names, *table])
    path = write(tmp_path_factory.getbasetemp() / "round.csv", text.getvalue())
    read = read_rows(path)
    assert [list(row) for row in zip(*read.columns.values())] == table
    lines = text.getvalue().split("\n")
    for number, row in zip(read.lines, table):
        assert lines[number - 1].startswith('"' + row[0].replace('"', '""').split("\n")[0])
