"""`tightfit plan`: fits or recommends, writes what it recommends, reaches, verifies; wrong input is one line."""

import functools
import json
import sys

import pytest
from runs import project
from tiny_models import t5
from typer.testing import CliRunner

from tightfit.cli import app
from tightfit.train.recipe_file import read_recipe_file

KIB = 1024


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return project(tmp_path_factory.mktemp("plan"))


@pytest.fixture(scope="module")
def recipe(made):
    return made / "recipe.yaml"


@pytest.fixture(scope="module")
def peak(recipe):
    """The predicted peak of the stock step."""
    return json.loads(run("plan", recipe, "--json").stdout)["peak_bytes"]


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def refused(*arguments, code=2):
    """The one line on standard error of a command that must fail without a traceback."""
    result = run(*arguments)
    assert result.exit_code == code, result.output + result.stderr
    lines = [line for line in result.stderr.splitlines() if not line.startswith(("USDT", "note:"))]
    assert len(lines) == 1 and lines[0].startswith("tightfit: "), result.stderr
    assert "Traceback" not in result.output
    return lines[0]


def test_it_says_that_a_recipe_fits(recipe, peak):
    result = run("plan", recipe, "--budget", f"{2 * peak} B")
    assert result.exit_code == 0, result.stderr
    assert "predicted peak" in result.stdout and "to spare" in result.stdout


def test_it_recommends_where_a_recipe_does_not_fit(recipe, peak, tmp_path):
    budget = f"{peak - 8 * KIB} B"
    line = refused("plan", recipe, "--budget", budget)
    assert "over the budget of" in line and "--output" in line
    result = run("plan", recipe, "--budget", budget, "--output", tmp_path / "fits.yaml")
    assert result.exit_code == 0, result.stderr
    assert "does not fit" in result.stdout and f"next: tightfit train {tmp_path / 'fits.yaml'}" in result.stdout
    written = json.loads(run("plan", tmp_path / "fits.yaml", "--json", "--budget", budget).stdout)
    assert written["fits"] is True
    file = read_recipe_file(tmp_path / "fits.yaml")
    assert file.train.batch_size * file.train.gradient_accumulation == 8
    assert "exists" in refused("plan", recipe, "--budget", budget, "--output", tmp_path / "fits.yaml")


@pytest.mark.slow
def test_the_recommended_recipe_trains(recipe, peak, tmp_path):
    arguments = ["--budget", f"{peak - 8 * KIB} B", "--output", tmp_path / "fits.yaml", "--tune", "adapters"]
    assert run("plan", recipe, *arguments).exit_code == 0
    file = read_recipe_file(tmp_path / "fits.yaml")
    assert "Lora" in [next(iter(entry)) for entry in file.methods]
    trained = run("train", tmp_path / "fits.yaml", "train.max_steps=1", f"output={tmp_path}/run")
    assert trained.exit_code == 0, trained.stderr


def test_without_a_recipe_it_writes_one(made, tmp_path):
    out = tmp_path / "new.yaml"
    arguments = ["--model", made / "model", "--data", made / "train.tsv", "--task", "sequence-classification"]
    keys = ["data.label=label", "data.text=[sentence]", "train.batch_size=8", "train.max_length=16"]
    result = run("plan", *keys, *arguments, "--budget", "64MiB", "--output", out, "--json", "--verify")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["written"] == str(out) and found["budget_bytes"] == 64 * 2**20
    assert abs(found["verification"]["peak_error"]) < 1e-3
    best = found["choices"][0]
    assert best["exact"] and best["batch_size"] * best["accumulation"] == 8 and best["peak_bytes"] <= 64 * 2**20
    file = read_recipe_file(out)
    assert file.methods == best["recipe"] or file.methods == [{"PartialEmbedding": {}}]
    assert file.data.label == "label" and file.train.batch_size == best["batch_size"]
    assert "exists" in refused("plan", *keys, *arguments, "--budget", "64MiB", "--output", out)


@pytest.mark.slow
def test_a_method_of_the_recipe_is_tried_as_it_stands(recipe, peak):
    lora = "methods=[{Lora: {rank: 3}}]"
    result = run("plan", recipe, lora, "--tune", "adapters", "--budget", f"{peak // 3} B", "--json")
    choices = json.loads(result.stdout)["choices"]
    ranks = [entry["Lora"].get("rank") for choice in choices for entry in choice["recipe"] if "Lora" in entry]
    assert ranks and set(ranks) == {3}


def test_only_some_methods(recipe, peak):
    arguments = ["--methods", "checkpointing", "--budget", f"{peak - 8 * KIB} B", "--json"]
    choices = json.loads(run("plan", recipe, *arguments).stdout)["choices"]
    named = {name for choice in choices for entry in choice["recipe"] for name in entry}
    assert choices and named <= {"Checkpointing"}


@pytest.mark.slow
def test_how_far_it_reaches(recipe, peak):
    result = run("plan", recipe, "--budget", f"{2 * peak} B", "--largest-batch", "--longest-sequence", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["largest_batch"]["rows"] > 8
    assert found["longest_sequence"]["rows"] == 8 and found["longest_sequence"]["length"] <= 64
    shown = run("plan", recipe, "--budget", f"{2 * peak} B", "--largest-batch").stdout
    assert f"{found['largest_batch']['rows']} rows" in shown


def test_reach_goes_by_sources_and_targets(tmp_path):
    lines = ["in\tout", *["good\tthe film was very very good and the plot was fine"] * 8]
    (tmp_path / "a.tsv").write_text("\n".join(lines) + "\n")
    content = {
        "model": t5(tmp_path / "t5"),
        "task": "seq2seq-lm",
        "data": {"train": str(tmp_path / "a.tsv"), "text": ["in"], "target": "out"},
        "output": str(tmp_path / "run"),
    }
    (tmp_path / "a.yaml").write_text(json.dumps(content))
    whole = json.loads(run("plan", tmp_path / "a.yaml", "train.batch_size=4", "--json").stdout)["peak_bytes"]
    budget = f"{round(1.01 * whole)} B"
    result = run("plan", tmp_path / "a.yaml", "--budget", budget, "--largest-batch", "--json")
    assert json.loads(result.stdout)["largest_batch"]["rows"] == 4, result.stderr


def test_a_vocabulary_reaches_further(recipe, peak):
    arguments = ["--budget", f"{2 * peak} B", "--largest-batch", "--json"]
    stock = json.loads(run("plan", recipe, *arguments).stdout)["largest_batch"]["rows"]
    result = run("plan", recipe, "methods=[{PartialEmbedding: {force: true}}]", *arguments)
    assert json.loads(result.stdout)["largest_batch"]["rows"] >= stock, result.stderr


def test_verify_shows_predicted_beside_measured(recipe, tmp_path):
    page = tmp_path / "plan.html"
    result = run("plan", recipe, "methods=[Checkpointing]", "--verify", "--html", page)
    assert result.exit_code == 0, result.stderr
    for word in ("predicted", "measured", "forward", "backward", "optimizer", "zero grad", f"page: {page}"):
        assert word in result.stdout
    assert "<title>measured</title>" in page.read_text()
    found = json.loads(run("plan", recipe, "train.gradient_accumulation=2", "--verify", "--json").stdout)
    assert abs(found["verification"]["peak_error"]) < 1e-3


def test_a_step_that_cannot_be_simulated(recipe, monkeypatch):
    from transformers import BertForSequenceClassification

    forward = BertForSequenceClassification.forward

    def reads(self, *args, labels=None, **kwargs):
        out = forward(self, *args, labels=labels, **kwargs)
        assert out.loss.item() == out.loss.item()
        return out

    monkeypatch.setattr(BertForSequenceClassification, "forward", reads)
    assert "_local_scalar_dense" in refused("plan", recipe, code=1)
    result = run("plan", recipe, "--or-measure")
    assert result.exit_code == 0, result.stderr
    assert "measured peak" in result.stdout and "_local_scalar_dense" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["a recipe file", "--model"]),
        (["--model", "demo:minilm", "--budget", "1GiB"], ["--model and --data go together"]),
        (["--model", "demo:minilm", "--data", "demo:stdlib"], ["--model needs --budget"]),
        (["RECIPE", "--largest-batch"], ["--largest-batch needs --budget"]),
        (["RECIPE", "--output", "x.yaml"], ["--output needs --budget"]),
        (["RECIPE", "--exact"], ["--exact needs --budget"]),
        (["RECIPE", "--task", "causal-lm"], ["--task goes with --model", "task=causal-lm"]),
        (["RECIPE", "--tune", "adapters"], ["--tune needs --budget"]),
        (
            ["RECIPE", "--budget", "1GiB", "--largest-batch", "--html", "x.html"],
            ["--largest-batch", "leave --html out"],
        ),
        (["RECIPE", "--budget", "1GiB", "--longest-sequence", "--output", "x.yaml"], ["leave --output out"]),
        (["RECIPE", "--device", "tpu"], ["--device", "'tpu'"]),
        (["RECIPE", "--tune", "some", "--budget", "1GiB"], ["--tune", "'some'", "adapters"]),
        (["RECIPE", "--methods", "loraa", "--budget", "1GiB"], ["unknown name 'loraa'"]),
        (["RECIPE", "--budget", "900TiB"], ["of this machine has", "--elsewhere"]),
        (["RECIPE", "--budget", "24"], ["without a unit"]),
        (["RECIPE", "--budget", "1GiB", "--output", "nowhere/x.yaml"], ["no folder nowhere"]),
        (["RECIPE", "--html", "nowhere/x.html"], ["--html", "no folder nowhere"]),
        (["RECIPE", "--html", "."], ["--html", "a folder"]),
        (["RECIPE", "methods=[Lora, Lora]"], ["cannot be applied", "Lora"]),
        (["--model", "MODEL", "--data", "x.tsv", "--budget", "1GiB"], ["task: cannot be told", "--task"]),
        (["--model", "/nowhere", "--data", "x.tsv", "--budget", "1GiB"], ["/nowhere"]),
        (["--model", "MODEL", "--data", "x.tsv", "--budget", "1GiB", "--task", "parsing"], ["task", "'parsing'"]),
        (["--model", "MODEL", "--data", "nowhere.tsv", "--budget", "1GiB", "--task", "causal-lm"], ["nowhere.tsv"]),
        (["RECIPE", "--model", "MODEL", "--data", "x.tsv", "--budget", "1GiB"], ["recipe.yaml and --model"]),
    ],
)
def test_wrong_input(made, recipe, arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"RECIPE": recipe, "MODEL": made / "model"}
    line = refused("plan", *(names.get(a, a) for a in arguments))
    assert all(word in line for word in words), line
    assert "/tmp" not in line.replace(str(made), "").replace(str(tmp_path), "")
    assert not list(tmp_path.iterdir())


def test_conflicts_come_before_any_simulation(recipe, monkeypatch):
    from tightfit.core import simulate as module

    monkeypatch.setattr(module, "simulate", functools.wraps(module.simulate)(lambda *a, **k: 1 / 0))
    assert "cannot be applied" in refused("plan", recipe, "methods=[Lora, Lora]", "--budget", "1GiB")


def test_a_bar_appears_on_a_terminal_after_a_while(monkeypatch, capsys):
    import time

    from tightfit.cli import waiting as module

    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.05)
    with module.waiting("working"):
        time.sleep(0.2)
    assert capsys.readouterr().err == ""  # no terminal
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with module.waiting("too short to show"):
        pass
    with module.waiting("working") as tell:
        tell(1, 2)
        time.sleep(0.3)
    shown = capsys.readouterr().err
    assert "working" in shown and "too short" not in shown
