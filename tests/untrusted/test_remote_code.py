"""A model folder that carries code of its own: nothing of it runs, wherever a model, config or tokenizer is loaded."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import runs
import tiny_models
from fuzzing import bounded
from typer.testing import CliRunner

import tightfit
from tightfit.cli import app
from tightfit.train.images import build_processor
from tightfit.train.tasks import build_tokenizer

SOURCES = sorted(Path(tightfit.__file__).parent.rglob("*.py"))
AUTO = ["AutoConfig", "AutoModel", "AutoModelForSequenceClassification", "AutoModelForImageClassification"]


@pytest.fixture
def evil(tmp_path):
    """A project whose model says that its classes are in a file beside it, which would leave a mark."""
    runs.project(tmp_path)
    folder, mark = tmp_path / "model", tmp_path / "ran"
    (folder / "evil.py").write_text(
        f"open({str(mark)!r}, 'w').close()\nclass Config: pass\nModel = Tokenizer = Config\n"
    )
    config = json.loads((folder / "config.json").read_text())
    classes = {name: "evil.Config" if name == "AutoConfig" else "evil.Model" for name in AUTO}
    config |= {"model_type": "evil", "architectures": ["Model"], "auto_map": classes}
    (folder / "config.json").write_text(json.dumps(config))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    yield tmp_path
    assert not mark.exists()


def test_a_skeleton(evil):
    with bounded(10), pytest.raises(tightfit.UnsupportedModelError, match=r"no config could be read"):
        tightfit.skeleton(evil / "model", task="sequence-classification")


def test_a_tokenizer_and_a_processor(evil):
    with bounded(10), pytest.raises(tightfit.RecipeError):
        build_tokenizer(runs.recipe_file(evil))
    with bounded(10), pytest.raises(tightfit.RecipeError):
        build_processor(str(evil / "model"))


@pytest.mark.parametrize("command", ["train", "plan", "measure"])
def test_commands(evil, command):
    """Also with a good tokenizer, so that the model's own code is reached; nobody is asked at the terminal."""
    tiny_models.wordpiece().save_pretrained(evil / "model")
    with bounded(30):
        result = CliRunner().invoke(app, [command, str(evil / "recipe.yaml")], input="y\n" * 9)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output + result.stderr


def test_every_load_by_an_auto_class_says_so():
    """No call leaves `trust_remote_code` to its default, and none gives anything but False."""
    found = 0
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert isinstance(node.value, ast.Constant) and node.value.value is False, path
            if (
                isinstance(node, ast.Attribute)
                and node.attr == "from_pretrained"
                and "Auto" in ast.unparse(node).title()
            ):
                assert "trust_remote_code" in text, path
                found += 1
    assert found >= 4
