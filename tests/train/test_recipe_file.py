import math
import pathlib

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tightfit.core.errors import RecipeError
from tightfit.train import recipe_file as module
from tightfit.train.folder import check_free
from tightfit.train.marked_yaml import dump_yaml, parse_value
from tightfit.train.recipe_file import read_recipe_file, write_recipe_file

GOOD = """\
model: demo:minilm
task: sequence-classification
data:
  train: demo:stdlib
methods:
  - Lora: {rank: 4}
  - Checkpointing
train: {epochs: 2, batch_size: 8, learning_rate: 2e-5}
output: runs/one
"""


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD)
    return path


def refused(path, *overrides):
    with pytest.raises(RecipeError) as caught:
        read_recipe_file(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_reads_what_is_given_and_completes_the_rest(good):
    file = read_recipe_file(good)
    assert (file.train.epochs, file.train.batch_size, file.train.learning_rate) == (2, 8, 2e-5)
    assert file.train.weight_decay == 0.0 and file.train.seed == 0 and file.train.precision == "fp32"
    assert file.methods == [{"Lora": {"rank": 4}}, {"Checkpointing": {}}]
    assert [type(t).__name__ for t in file.recipe] == ["Lora", "Checkpointing"]


def test_resolved_file_reads_back_equal(good, tmp_path):
    file = read_recipe_file(good, ["data.text=[a, b]", "train.max_steps=7"])
    out = tmp_path / "resolved.yaml"
    write_recipe_file(file, out)
    assert read_recipe_file(out) == file
    assert yaml.safe_load(out.read_text())["train"]["learning_rate"] == 2e-5  # a YAML 1.1 reader agrees
    assert [p.name for p in tmp_path.iterdir()].count("resolved.yaml") == 1
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".resolved")]
    assert out.stat().st_mode == good.stat().st_mode  # others may read it, as any file


def test_a_failed_write_leaves_the_old_file(good, tmp_path, monkeypatch):
    out = tmp_path / "resolved.yaml"
    out.write_text("old")
    monkeypatch.setattr(module.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        write_recipe_file(read_recipe_file(good), out)
    assert out.read_text() == "old" and sorted(p.name for p in tmp_path.iterdir()) == ["recipe.yaml", "resolved.yaml"]


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("output: runs/one", "outputs: runs/one", 9, ["outputs", "unknown key", "did you mean 'output'"]),
        ("epochs: 2", "epoch: 2", 8, ["train.epoch", "did you mean 'epochs'", "batch_size"]),
        ("epochs: 2", "epochs: -2", 8, ["train.epochs", "-2", "> 0"]),
        ("epochs: 2", "epochs: two", 8, ["train.epochs", "'two'", "a number"]),
        ("batch_size: 8", "batch_size: 8.5", 8, ["train.batch_size", "8.5", "whole number"]),
        ("batch_size: 8", "batch_size: true", 8, ["train.batch_size", "True", "whole number"]),
        ("batch_size: 8", "batch_size: 0", 8, ["train.batch_size", "0", "> 0"]),
        ("batch_size: 8", "batch_size: 1" + "0" * 23, 8, ["train.batch_size", "0000", "< 2147483648"]),
        ("batch_size: 8", "max_length: 1" + "0" * 19, 8, ["train.max_length", "0000", "< 2147483648"]),
        ("learning_rate: 2e-5", "learning_rate: .inf", 8, ["train.learning_rate", "inf", "finite"]),
        ("epochs: 2", "precision: int8", 8, ["train.precision", "int8", "fp32, bf16, fp16"]),
        ("epochs: 2", "optimizer: adam", 8, ["train.optimizer", "adam", "adamw, adamw-fused, sgd, adafactor"]),
        ("sequence-classification", "sequence-clasification", 2, ["did you mean 'sequence-classification'"]),
        ("demo:minilm", "''", 1, ["model", "empty text"]),
        ("demo:minilm", "", 1, ["model", "nothing", "a text"]),
        ("train: demo:stdlib", "train: 3", 4, ["data.train", "3", "a text"]),
        ("train: demo:stdlib", "eval: demo:stdlib", 3, ["data.train", "required"]),
        ("train: demo:stdlib", "train: x\n  labels: y", 5, ["data.labels", "did you mean 'label'"]),
        ("train: demo:stdlib", "train: x\n  text: [a, b, c]", 5, ["data.text", "at most 2"]),
        ("train: demo:stdlib", "train: x\n  eval_fraction: 1.0", 5, ["data.eval_fraction", "< 1"]),
        ("task: sequence-classification\n", "", 1, ["task", "required"]),
        ("Lora: {rank: 4}", "Loro: {rank: 4}", 6, ["Loro", "unknown method", "did you mean 'Lora'"]),
        ("Lora: {rank: 4}", "Lora:\n      rank: 4\n      alfa: 3", 8, ["alfa", "did you mean 'alpha'"]),
        ("Lora: {rank: 4}", "Lora:\n      alpha: 3\n      rank: -4", 8, ["rank", "-4"]),
        ("- Checkpointing", "- 7", 7, ["methods.1", "7"]),
        ("task: seq", "model: other\ntask: seq", 2, ["model", "twice", "line 1"]),
        ("epochs: 2", "seed: 1, seed: 2", 8, ["train.seed", "twice"]),
        ("methods:", "methods: [", 6, ["not valid YAML"]),
        ("  train: demo:stdlib", "\ttrain: demo:stdlib", 4, ["not valid YAML"]),
        ("output: runs/one", "output: ''", 9, ["output", "a path"]),
        ("output: runs/one", "output: &a [*a]", 9, ["output", "contains itself"]),
        ("output: runs/one", "? [a]\n: b", 9, ["plain text"]),
    ],
)
def test_bad_files_are_refused_with_file_line_and_key(good, old, new, line, words):
    assert GOOD.count(old) >= 1
    good.write_text(GOOD.replace(old, new, 1))
    message = refused(good)
    assert message.startswith(f"{good}:{line}: "), message
    for word in words:
        assert word in message, message


def test_files_that_are_no_recipe(tmp_path):
    assert "no such recipe file" in refused(tmp_path / "none.yaml")
    assert "folder" in refused(tmp_path)
    empty = tmp_path / "empty.yaml"
    empty.write_text("")
    assert "got nothing" in refused(empty)
    empty.write_text("- a\n- b\n")
    assert "got list" in refused(empty)
    empty.write_bytes(b"model: a\ntask: caf\xe9\n")
    assert f"{empty}:2: byte 0xe9 is not UTF-8" in refused(empty)


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000])
def test_an_output_that_no_folder_can_be_named(good, name):
    file = read_recipe_file(good).model_copy(update={"output": pathlib.Path(name)})
    with pytest.raises(RecipeError, match=r"output: .* cannot be used: "):
        check_free(file, resume=False)


def test_images_have_no_length_to_be_grouped_by(good):
    message = refused(good, "task=image-classification", "train.group_by_length=true")
    assert "group_by_length" in message and "images have no length" in message


def test_overrides(good):
    file = read_recipe_file(
        good, ["train.epochs=1", "methods.0.Lora.rank=2", "methods.1.Checkpointing={}", "data.eval=", "output=x/y"]
    )
    assert file.train.epochs == 1 and file.methods[0] == {"Lora": {"rank": 2}} and file.data.eval is None
    assert str(file.output) == "x/y"
    assert read_recipe_file(good, ["methods=[]"]).methods == []
    assert read_recipe_file(good, ["model=a=b"]).model == "a=b"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("epochs", ["key=value"]),
        ("=1", ["key=value"]),
        ("train.epoch=1", ["override 'train.epoch=1'", "did you mean 'epochs'"]),
        ("train.epochs=x", ["override 'train.epochs=x'", "train.epochs", "'x'"]),
        ("train.epochs=[", ["override 'train.epochs=['", "not valid YAML"]),
        ("methods.9.Lora.rank=1", ["'9'", "list of 2"]),
        ("methods=[Nope]", ["override 'methods=[Nope]'", "unknown method 'Nope'"]),
        ("methods.0.Lora.rank=-1", ["override 'methods.0.Lora.rank=-1'", "-1"]),
        ("model.x=1", ["'demo:minilm'", "no key 'x'"]),
    ],
)
def test_bad_overrides_are_named(good, override, words):
    message = refused(good, override)
    for word in words:
        assert word in message, message


def test_relative_paths_are_found_here_or_beside_the_recipe(good, tmp_path, monkeypatch):
    (tmp_path / "data.tsv").write_text("a\tb\n1\t2\n")
    good.write_text(GOOD.replace("demo:stdlib", "data.tsv"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert read_recipe_file(good).data.train == str(tmp_path / "data.tsv")
    (elsewhere / "data.tsv").write_text("a\tb\n1\t2\n")
    assert read_recipe_file(good).data.train == "data.tsv"
    (tmp_path / "rows").mkdir()
    assert read_recipe_file(good, ["data.train=rows:train"]).data.train == str(tmp_path / "rows:train")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-5", 2e-5),
        ("1E3", 1e3),
        ("-3", -3),
        (".5", 0.5),
        ("true", True),
        ("no", "no"),
        ("on", "on"),
        ("1:30", "1:30"),
        *[("2024-01-01", "2024-01-01"), ("~", None), ("'1'", "1"), ("1.2.3", "1.2.3"), ("-", "-"), ("1_000", "1_000")],
    ],
)
def test_scalars_follow_yaml_1_2(text, value):
    read = parse_value(text, "here") if text != "-" else parse_value("'-'", "here")
    assert read == value and type(read) is type(value)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(min_size=1), inner, max_size=3),
    max_leaves=6,
)


@given(VALUES)
def test_dumped_yaml_reads_back_equal_here_and_in_yaml_1_1(value):
    text = dump_yaml(value)
    assert parse_value(text, "here") == value
    assert yaml.safe_load(text) == value


def test_infinity_is_a_number_of_yaml_and_no_number_of_a_recipe(good):
    assert parse_value(".inf", "here") == math.inf
    assert "finite" in refused(good, "train.weight_decay=.inf")
