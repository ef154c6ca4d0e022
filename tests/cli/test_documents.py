"""Every code block of README and docs runs as it stands, in a folder with a tiny model and data."""

from __future__ import annotations

import ast
import gc
import os
import re
import shlex
import subprocess
import sys
import textwrap
import types
from pathlib import Path
from typing import get_args

import pytest
import runs
import tiny_models
import torch
import transformers as hf
import yaml
from typer.testing import CliRunner

import tightfit
from tightfit.cli.app import app
from tightfit.core.recipe import Recipe, method_classes
from tightfit.train.recipe_file import DataSection, RecipeFile, Task, TrainSection

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").rglob("*.md") if "```" in p.read_text())]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
IMAGES = {"losa.md", "learnable-memory.md"}
DECODERS = {"plan.md", "velora.md", "recurrent-memory.md"}
"""Pages whose model is a decoder."""
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
OUTSIDE = ("make", "pip")
"""Commands that set the whole machine up; the project's own checks run them."""


def blocks(page: Path, *languages: str) -> list[str]:
    return [code for language, code in BLOCK.findall(page.read_text()) if language in languages]


def collated(features):
    return {key: torch.tensor([row[key] for row in features]) for key in features[0]}


def classifier(folder: Path) -> None:
    """A BERT with its tokenizer under the name the docs use."""
    torch.manual_seed(0)
    tokenizer = tiny_models.wordpiece()
    tokenizer.save_pretrained(folder / "path-or-hub-id")
    config = hf.BertConfig(**{**SIZE, "num_hidden_layers": 4}, vocab_size=len(tokenizer), max_position_embeddings=128)
    hf.BertForSequenceClassification(config).save_pretrained(folder / "path-or-hub-id")


def model_of(page: Path):
    if page.name in IMAGES:
        return hf.AutoModelForImageClassification.from_pretrained("vit")
    auto = hf.AutoModelForCausalLM if page.name in DECODERS else hf.AutoModelForSequenceClassification
    return auto.from_pretrained("path-or-hub-id")


def rows_of(count: int) -> list[dict]:
    return [{"input_ids": [2, 5 + i % 7, 6, 7, 3], "attention_mask": [1] * 5, "labels": i % 2} for i in range(count)]


@pytest.fixture
def names(request, tmp_path, monkeypatch):
    """What a reader is taken to have, in a folder of its own."""
    page = request.node.callspec.params["page"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if page.name in DECODERS:
        torch.manual_seed(0)
        hf.LlamaForCausalLM(hf.LlamaConfig(**SIZE, vocab_size=300)).save_pretrained("path-or-hub-id")
        tiny_models.bytes_bpe(eos_token="<eos>").save_pretrained("path-or-hub-id")
    else:
        classifier(tmp_path)
    tiny_models.vit(tmp_path / "vit")
    if page.name == "integrations.md":
        hf.LlamaForCausalLM(hf.LlamaConfig(**SIZE, vocab_size=300)).save_pretrained("decoder")
        tiny_models.bytes_bpe(eos_token="<eos>", pad_token="<pad>").save_pretrained("decoder")
    model = model_of(page)
    tokenizer = hf.AutoTokenizer.from_pretrained("path-or-hub-id")
    arguments = hf.TrainingArguments("out", max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True)
    batch = collated(rows_of(4))
    return {
        "tightfit": tightfit,
        "torch": torch,
        "Trainer": hf.Trainer,
        "model": model,
        "vit": model,
        "pixels": torch.randn(2, 3, 16, 16),
        "tokenizer": tokenizer,
        "texts": [" ".join(tiny_models.WORDS)],
        "held_out_texts": ["a fine story"],
        "rows": rows_of(16),
        "long_rows": [{"input_ids": ids, "labels": ids} for ids in torch.randint(5, 90, (4, 600)).tolist()],
        "prompt": torch.randint(5, 90, (1, 10)),
        "collator": collated,
        "batches": [batch, batch],
        "arguments": arguments,
        "recipe": tightfit.Lora(rank=2),
    }


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.name, marks=pytest.mark.slow if page.name == "plan.md" else ())
        for page in PAGES
        if blocks(page, "python") and "internals" not in page.parts
    ],
)
def test_python_of_the_docs_runs(page, names, capsys):
    for code in blocks(page, "python"):
        exec(compile(code, f"{page.name}: {code[:40]!r}", "exec"), names)


def test_the_worked_example_passes_its_own_tests(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests")
    import models
    from checks.rows import Row

    names = {"__name__": "worked_example", "models": models, "pytest": pytest, "tightfit": tightfit, "Row": Row}
    monkeypatch.setitem(sys.modules, "worked_example", types.ModuleType("worked_example"))
    for code in blocks(ROOT / "docs" / "internals" / "adding-a-method.md", "python"):
        exec(compile(code, "adding-a-method.md", "exec"), names)
    tests = [item for name, item in names.items() if name.startswith("test_")]
    assert len(tests) == 2
    for test in tests:
        test()
    plan = tightfit.plan(models.bert(), tightfit.chain(names["BitFit"](norms=True), tightfit.FusedOps()), batch=(2, 8))
    assert 0 < plan.trainable_parameters < plan.total_parameters // 4
    with pytest.raises(TypeError, match="norms"):
        names["BitFit"](norms=1)
    del plan, tests, test
    names.clear()
    gc.collect()  # classes of methods are known for as long as they live
    assert "BitFit" not in method_classes()


@pytest.mark.parametrize("page", [p for p in PAGES if "internals" in p.parts], ids=lambda p: p.name)
def test_excerpts_are_python(page):
    for code in blocks(page, "python"):
        ast.parse("def excerpt():\n" + textwrap.indent(code, "    "))


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "yaml")], ids=lambda p: p.name)
def test_yaml_of_the_docs_is_a_recipe(page):
    for code in blocks(page, "yaml"):
        content = yaml.safe_load(code)
        if "model" in content:
            RecipeFile.model_validate(content)
        else:
            assert Recipe.from_list(content["methods"])


@pytest.mark.parametrize("section", [DataSection, TrainSection], ids=["data", "train"])
def test_every_key_of_a_recipe_file_is_documented_with_its_default(section, request):
    page = (ROOT / "docs" / "recipe-file.md").read_text()
    table = page.partition(f"## `{request.node.callspec.id}`\n")[2].partition("\n## ")[0]
    shown = dict(re.findall(r"^\| `(\w+)` \| (\S+) \|", table, re.MULTILINE))
    words = {"None": "none", "False": "false", "PydanticUndefined": "required"}
    defaults = {name: str(field.default) for name, field in section.model_fields.items()}
    assert shown == {name: words.get(default, default) for name, default in defaults.items()}


def test_every_task_is_documented():
    page = (ROOT / "docs" / "recipe-file.md").read_text()
    assert set(re.findall(r"^\| `([a-z2-]+-[a-z]+)` \|", page, re.MULTILINE)) == set(get_args(Task))


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    reference = (tmp_path / "site" / "reference" / "index.html").read_text()
    shown = {name for name in tightfit.__all__ if f'id="tightfit.{name}"' in reference}
    assert shown >= {cls.__name__ for cls in tightfit.methods()} | {"plan", "apply", "recommend", "Applied", "Plan"}


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "bash")], ids=lambda p: p.name)
def test_commands_of_the_docs_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    classifier(tmp_path)
    (tmp_path / "train.tsv").write_text(runs.rows(40))
    (tmp_path / "dev.tsv").write_text(runs.rows(16, seed=1))
    files = [code for code in blocks(ROOT / "README.md", "yaml") if code.startswith("# ")]
    for code in files:
        (tmp_path / code.splitlines()[0].removeprefix("# ")).write_text(code.replace("epochs: 3", "max_steps: 2"))
    ran = 0
    for line in "".join(blocks(page, "bash")).splitlines():
        command = shlex.split(line, comments=True)
        if not command or command[0] in OUTSIDE:
            continue
        assert command[0] == "tightfit", line
        result = CliRunner().invoke(app, command[1:])
        assert result.exit_code == 0, f"{line}\n{result.output}"
        ran += 1
    assert ran or all(line.startswith(OUTSIDE) for line in "".join(blocks(page, "bash")).splitlines())
