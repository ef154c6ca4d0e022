import hashlib
import re
import subprocess
import sys
from collections import Counter

import pytest

from tightfit.core.errors import DataError
from tightfit.train import demo_data
from tightfit.train.demo_data import MASK, stdlib_docstrings
from tightfit.train.recipe_file import DataSection
from tightfit.train.sources import read_sources


@pytest.fixture(scope="module")
def rows():
    return stdlib_docstrings()


def test_thousands_of_rows_about_ten_packages_none_dominant(rows):
    assert 2500 <= len(rows) <= 6000
    counts = Counter(row.package for row in rows)
    assert 8 <= len(counts) <= 12
    assert max(counts.values()) <= demo_data.MOST_PER_CLASS and min(counts.values()) >= 90
    share = sum(row.split == "eval" for row in rows) / len(rows)
    assert 0.15 < share < 0.25
    for split in ("train", "eval"):
        assert {row.package for row in rows if row.split == split} == set(counts)


def test_no_row_contains_a_label_not_even_as_part_of_a_word(rows):
    labels = {row.package for row in rows}
    for row in rows:
        assert not [label for label in labels if label.lower() in row.text.lower()], row


def test_no_text_is_in_both_splits_or_in_two_packages(rows):
    def normal(text):
        return " ".join(re.findall(r"\w+", text.lower()))

    assert len({normal(row.text) for row in rows}) == len(rows)


def test_rows_are_sorted_and_short_ones_left_out(rows):
    assert rows == sorted(rows)
    for row in rows:
        words = [w for w in row.text.replace(MASK, " ").split() if any(c.isalpha() for c in w)]
        assert len(words) >= 4 and len(row.text.split()) <= 40


def test_another_process_finds_the_same_rows_quickly_and_imports_nothing_it_reads(rows):
    code = (
        "import sys, time, hashlib\n"
        "from tightfit.train.demo_data import stdlib_docstrings\n"
        "before = set(sys.modules); begin = time.process_time(); rows = stdlib_docstrings()\n"
        "print(hashlib.sha256(repr(rows).encode()).hexdigest(), time.process_time() - begin,"
        " sorted(set(sys.modules) - before))"
    )
    environment = {"PYTHONHASHSEED": "7", "PATH": ""}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    digest, seconds, imported = out.stdout.split(maxsplit=2)
    assert digest == hashlib.sha256(repr(rows).encode()).hexdigest()
    assert float(seconds) < 10  # of processor time; 2 to 4 on a busy machine
    assert not {"tkinter", "turtle", "mailbox", "xml.sax"} & set(re.findall(r"[\w.]+", imported))


def test_names_of_the_object_and_of_classes_are_masked():
    labels = re.compile("asyncio|xml", re.IGNORECASE)
    masked = demo_data._masked(
        "Run asyncio.run(x) in _asyncio or 3xml; an EventLoop helps gather, not gathered, see events.Event.",
        "asyncio.tasks.gather",
        labels,
        {"EventLoop"},
    )
    assert masked == f"Run {MASK}(x) in {MASK} or 3{MASK}; an {MASK} helps {MASK}, not gathered, see events.Event."


def test_passages_are_split_by_object(tmp_path, monkeypatch):
    package = tmp_path / "turtle"
    package.mkdir()
    lines = ["'''" + "Module words that say something at length.'''"]
    for i in range(400):
        lines.append(
            f"def f{i}():\n    '''First passage number {i} {'w ' * 36}\n\n    second passage number {i} ends.'''"
        )
    (package / "__init__.py").write_text("\n".join(lines))
    found = demo_data._found(tmp_path)
    assert {row.package for row in found} == {"turtle"}
    splits = {}
    for row in found:
        number = re.search(r"number (\d+)", row.text)
        if number:
            splits.setdefault(number[1], set()).add(row.split)
    assert splits and all(len(s) == 1 for s in splits.values())
    assert {s for group in splits.values() for s in group} == {"train", "eval"}


def test_broken_files_are_passed_over(tmp_path):
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n")
    assert demo_data._found(tmp_path) == ()


def test_as_a_data_source(rows):
    train, held_out, _ = read_sources(DataSection(train="demo:stdlib"))
    assert len(train) + len(held_out) == len(rows) and list(train.columns) == ["text", "package"]
    train, held_out, _ = read_sources(DataSection(train="demo:stdlib", rows=10, eval_rows=5))
    assert (len(train), len(held_out)) == (10, 5)


def test_a_python_without_sources_is_told_apart(monkeypatch):
    monkeypatch.setattr(demo_data, "stdlib_docstrings", list)
    with pytest.raises(DataError, match="no source files"):
        read_sources(DataSection(train="demo:stdlib"))
