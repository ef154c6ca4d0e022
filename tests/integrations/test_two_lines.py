"""Scripts of the shape of each library's quick start, as they are and with the lines that the docs add to them.

The scripts stand in `scripts`; the lines are the `diff` blocks of docs/integrations.md, named by their first line.
"""

from __future__ import annotations

import difflib
import json
import re
import runpy
import sys
import warnings
from pathlib import Path

import models
import pytest
import torch
from integration_cases import quiet, sentences, tokenizer
from integration_runs import reset_accelerate
from safetensors.torch import load_file

SCRIPTS = Path(__file__).parent / "scripts"
PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"
IMPORT = "import tightfit"
EXACT = ("sft_trainer.py", "peft_loop.py")
"""Scripts whose recipe gives the stock step's gradients but for rounding."""
LONG = ("sft_trainer.py", "dpo_trainer.py", "seq2seq_trainer.py", "lightning_fit.py")


def documented() -> dict[str, list[str]]:
    """Script -> the lines of its block, each with its sign."""
    blocks = re.findall(r"^```diff\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    named = [block.splitlines() for block in blocks]
    return {lines[0].removeprefix("# "): lines[1:] for lines in named}


def with_lines(script: str, block: list[str]) -> str:
    """The script after a block: lines with no sign are looked up in it, `+` is put there, `-` is taken out."""
    found, at = script.splitlines(), 0
    for line in block:
        sign, text = line[:1], line[1:]
        if sign == "+":
            found.insert(at, text)
            at += 1
            continue
        at = found.index(text, at)
        if sign == "-":
            del found[at]
        else:
            at += 1
    return "\n".join(found) + "\n"


def added(before: str, after: str) -> list[str]:
    """The lines of `after` that are new or other than in `before`."""
    lines = difflib.ndiff(before.splitlines(), after.splitlines())
    return [line[2:] for line in lines if line.startswith("+ ")]


def base_of(script: str) -> torch.nn.Module:
    family = {"seq2seq_trainer.py": "t5"}.get(script, "bert")
    return models.build("llama" if script in ("sft_trainer.py", "dpo_trainer.py", "torch_loop.py") else family)


def rows_for(script: str) -> list[dict]:
    """Rows from which the task can be learnt in a few steps."""
    texts = sentences(32, length=3)
    if script == "dpo_trainer.py":
        return [{"prompt": text, "chosen": " w20 w21 w22", "rejected": " w30 w31"} for text in texts]
    if script == "seq2seq_trainer.py":
        return [{"text": text, "target": "w20 w21 w22"} for text in texts]
    if isinstance(base_of(script), type(models.build("llama"))):
        return [{"text": f"{text} w20 w21 w22 w20 w21 w22"} for text in texts]
    return [{"text": f"{text}{(' w70', ' w71')[at % 2] * 4}", "label": at % 2} for at, text in enumerate(texts)]


def settings_of(script: str) -> dict[str, object]:
    """What the user of a Trainer's script gives on the command line."""
    if not script.endswith("trainer.py"):
        return {}
    more = {"output_dir": "out", "num_train_epochs": 3, "learning_rate": 5e-3, "per_device_train_batch_size": 8}
    more |= {"max_length": 16} if "sft" in script else {}
    more |= {"predict_with_generate": True} if "seq2seq" in script else {}
    return quiet(**more, logging_steps=1, save_strategy="no")


def run(text: str, name: str, folder: Path, monkeypatch) -> Path:
    """Run a script in a folder of its own; the folder that it leaves its result in."""
    folder.mkdir()
    base_of(name).save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    (folder / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows_for(name)))
    (folder / name).write_text(text)
    arguments = [part for key, value in settings_of(name).items() for part in (f"--{key}", str(value))]
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    reset_accelerate()
    torch.manual_seed(0)
    runpy.run_path(name, run_name="__main__")
    return folder / "result"


def stock_from(result: Path, name: str) -> torch.nn.Module:
    """What plain `from_pretrained` makes of a result."""
    cls = type(base_of(name))
    if name == "peft_loop.py":
        import peft

        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # PEFT warns of what it misses
            return peft.PeftModel.from_pretrained(cls.from_pretrained(result.parent / "base"), result)
    model, info = cls.from_pretrained(result, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model


def score(model: torch.nn.Module, name: str) -> float:
    """The mean loss on the task's own rows; for preferences the chosen answer's loss less the rejected one's."""
    model.eval()
    words, losses = tokenizer(), []
    for row in rows_for(name)[:8]:
        batch = dict(words(row.get("text", "w9"), return_tensors="pt"))
        with torch.no_grad():
            if "chosen" in row:
                ids = {
                    key: words(row["prompt"] + row[key], return_tensors="pt").input_ids
                    for key in row
                    if key != "prompt"
                }
                one, other = (model(input_ids=i, labels=i).loss * (i.shape[1] - 1) for i in ids.values())
                losses.append(float(one - other))
                continue
            if "target" in row:
                batch["labels"] = words(row["target"], return_tensors="pt").input_ids
            else:
                batch["labels"] = torch.tensor([row["label"]]) if "label" in row else batch["input_ids"]
            losses.append(float(model(**batch).loss))
    return sum(losses) / len(losses)


def files_of(result: Path) -> set[str]:
    return {path.name for path in result.iterdir()}


def test_every_script_has_its_lines_in_the_docs():
    assert set(documented()) == {path.name for path in SCRIPTS.glob("*.py")}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(path.name, id=path.stem, marks=pytest.mark.slow if path.name in LONG else ())
        for path in sorted(SCRIPTS.glob("*.py"))
    ],
)
def test_two_lines_more_train_a_script(name, tmp_path, monkeypatch):
    if name == "lightning_fit.py":
        pytest.importorskip("lightning")
    script = (SCRIPTS / name).read_text(encoding="utf-8")
    block = documented()[name]
    own = with_lines(script, block)
    new = added(script, own)
    assert IMPORT in new and 1 <= len([line for line in new if line != IMPORT]) <= 2, new
    assert any("tightfit.apply(" in line for line in new)
    assert IMPORT not in script

    stock = run(script, name, tmp_path / "stock", monkeypatch)
    tight = run(own, name, tmp_path / "tight", monkeypatch)

    assert files_of(tight) == files_of(stock)
    weights = "adapter_model.safetensors" if name == "peft_loop.py" else "model.safetensors"
    before, after = load_file(stock / weights), load_file(tight / weights)
    assert {key: (t.shape, t.dtype) for key, t in after.items()} == {
        key: (t.shape, t.dtype) for key, t in before.items()
    }
    if name != "peft_loop.py":
        base = load_file(tmp_path / "tight" / "base" / weights)
        still = [key for key, value in base.items() if torch.equal(after[key], value)]
        assert [key for key, value in base.items() if torch.equal(before[key], value)] == still
        assert json.loads((tight / "config.json").read_text()) == json.loads((stock / "config.json").read_text())
    if name in EXACT:
        for key, value in before.items():
            torch.testing.assert_close(after[key], value, rtol=0, atol=1e-3, msg=lambda m, k=key: f"{k}: {m}")

    begun, ended = score(base_of(name), name), score(stock_from(tight, name), name)
    assert ended < begun - 0.1 * abs(begun)
