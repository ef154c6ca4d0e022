import json
import re
import resource
import subprocess
import sys
import xml.etree.ElementTree as tree
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import project, recipe_file
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

import tightfit
from tightfit.core.errors import ArtifactError, RecipeError, TrainingError
from tightfit.train.bench import training_step
from tightfit.train.callbacks import append_line
from tightfit.train.card import write_report
from tightfit.train.data import longest_batch
from tightfit.train.failures import is_no_space
from tightfit.train.folder import read_metrics, read_run, rewind_metrics
from tightfit.train.run import build_skeleton, export_run, filled, plan_run, prepare, train
from tightfit.train.svg import line_plot, ticks
from tightfit.train.tasks import build_model
from tightfit.train.trainer import RunTrainer

pytestmark = pytest.mark.usefixtures("light_garbage")


@pytest.fixture(scope="module")
def stock(folder):
    return train(recipe_file(folder, [], "stock", epochs=12, learning_rate=1e-2))


def test_a_run_learns_and_measures(folder, stock):
    assert stock.metric_name == "accuracy" and stock.metric > 0.9
    assert stock.steps == 60 and set(stock.metrics) == {"loss", "accuracy", "f1", "matthews"}
    assert stock.trainable_parameters == stock.total_parameters
    assert abs(stock.predicted_peak_bytes / stock.peak_bytes - 1) < 0.05
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=2)
    state = sum(p.nbytes for p in model.parameters()) * 4  # weights, gradients, two moments
    assert stock.peak_bytes > 0.9 * state and 0 < stock.saved_bytes < stock.peak_bytes


def test_the_run_folder(folder, stock):
    assert (folder / "stock" / "recipe.yaml").read_text().count("learning_rate: 0.01") == 1
    rows = read_metrics(folder / "stock")
    assert [r["step"] for r in rows if "loss" in r] == list(range(1, 61))
    assert [r["step"] for r in rows if "eval_loss" in r] == list(range(5, 61, 5))
    assert rows[0]["loss"] > rows[-2].get("loss", 0)
    known = read_run(folder / "stock")
    assert known["result"]["metric"] == stock.metric and known["data"]["train_rows"] == 40
    card = (folder / "stock" / "README.md").read_text()
    assert str(known["data"]["fingerprint"]) in card and f"{stock.metric:.4f}" in card
    assert card.startswith("---\nbase_model:")


def test_the_report_is_one_file_for_any_screen(folder, stock):
    page = write_report(folder / "stock").read_text()
    assert 'name="viewport"' in page and page.count("<svg") == 5  # loss, and four scores
    assert not re.search(r"(src|href)=|url\(|@import|<script", page)
    for svg in re.findall(r"<svg.*?</svg>", page):
        tree.fromstring(svg)


def test_partial_embedding_ends_on_the_bits_of_stock(folder, stock):
    part = train(recipe_file(folder, [{"PartialEmbedding": {}}], "part", epochs=12, learning_rate=1e-2))
    assert part.metrics == stock.metrics
    assert part.trainable_parameters < stock.trainable_parameters and part.peak_bytes < stock.peak_bytes
    export_run(folder / "stock", folder / "stock-model")
    export_run(folder / "part", folder / "part-model")
    one, other = (load_file(folder / f"{name}-model" / "model.safetensors") for name in ("stock", "part"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_export_gives_the_scores_of_the_run(folder, stock):
    file = recipe_file(folder, [], "stock")
    out = folder / "again"
    export_run(folder / "stock", out)
    model = AutoModelForSequenceClassification.from_pretrained(out).eval()
    data = prepare(file).data
    batch = data.collator([data.eval[i] for i in range(len(data.eval))])
    with torch.no_grad():
        said = model(**batch).logits.argmax(-1)
    assert float((said == batch["labels"]).float().mean()) == pytest.approx(stock.metric)


def test_a_run_is_exported_from_any_directory(folder, tmp_path, the_weights, monkeypatch):
    monkeypatch.chdir(folder)
    train(recipe_file(folder, [], tmp_path / "run", max_steps=1).model_copy(update={"model": "model"}))
    monkeypatch.chdir(tmp_path)
    export_run(Path("run"), Path("out"))
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_load_puts_a_run_on_its_base(folder, stock):
    file = recipe_file(folder, [], "stock")
    model = build_model(file, prepare(file).data)
    applied = tightfit.load(model, folder / "stock")
    assert applied.recipe == stock.recipe


def test_one_seed_one_result_another_seed_another(folder, tmp_path):
    runs = [train(recipe_file(folder, [], tmp_path / str(i), max_steps=3, seed=i // 2)) for i in range(3)]
    states = [load_file(run.output / "tightfit.safetensors") for run in runs]
    equal = [all(torch.equal(states[0][k], s[k]) for k in s) for s in states]
    assert equal == [True, True, False]


def test_accumulated_steps_are_the_steps_of_the_whole_batch(tmp_path):
    """transformers leaves out the division for models that accept `num_items_in_batch` and ignore it."""
    folder = project(tmp_path)
    config = json.loads((folder / "model" / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "model" / "config.json").write_text(json.dumps(config))
    options = {"optimizer": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0, "epochs": 1}
    whole = train(recipe_file(folder, [], "whole", **options))
    parts = train(recipe_file(folder, [], "parts", batch_size=4, gradient_accumulation=2, **options))
    one, other = (load_file(run.output / "tightfit.safetensors") for run in (whole, parts))
    assert whole.steps == parts.steps == 5
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-6)


def test_batches_of_about_one_length(folder, tmp_path, monkeypatch):
    def seen(grouped):
        epochs, real = [], RunTrainer.training_step

        def step(self, model, inputs, *args, **kwargs):
            if self.state.global_step % 20 == 0:
                epochs.append([])
            epochs[-1].append(inputs["attention_mask"])
            return real(self, model, inputs, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(RunTrainer, "training_step", step)
            options = {"batch_size": 2, "group_by_length": grouped}
            train(recipe_file(folder, [], tmp_path / f"grouped-{grouped}", **options))
        return epochs

    def padding(epochs):
        return sum(int((1 - mask).sum()) for epoch in epochs for mask in epoch)

    def lengths(epoch):
        return [tuple(mask.sum(1).tolist()) for mask in epoch]

    grouped = seen(True)
    assert padding(grouped) < 0.5 * padding(seen(False))
    assert [len(epoch) for epoch in grouped] == [20, 20] and lengths(grouped[0]) != lengths(grouped[1])
    assert sorted(sum(lengths(grouped[0]), ())) == sorted(sum(lengths(grouped[1]), ()))


def test_evaluation_leaves_the_random_state_alone(folder, tmp_path):
    often = train(recipe_file(folder, [], tmp_path / "often", eval_every=1))
    seldom = train(recipe_file(folder, [], tmp_path / "seldom"))
    one, other = (load_file(run.output / "tightfit.safetensors") for run in (often, seldom))
    assert all(torch.equal(one[k], other[k]) for k in one)


def test_precision(folder, tmp_path):
    if not torch.accelerator.is_available():
        with pytest.raises(RecipeError, match=r"train\.precision: fp16 needs a GPU"):
            train(recipe_file(folder, [], tmp_path / "run", precision="fp16"))
        assert not (tmp_path / "run").exists()
    file = recipe_file(folder, [], tmp_path / "run", max_steps=2, precision="bf16")
    (tmp_path / "bf16.yaml").write_text(json.dumps(file.model_dump(mode="json", exclude_none=True)))
    # in a process of its own: a peak counts what other tests have left alive
    subprocess.run([sys.executable, "-m", "tightfit", "train", str(tmp_path / "bf16.yaml")], check=True)
    result = read_run(tmp_path / "run")["result"]
    assert result["metrics"]["loss"] < 10
    assert abs(result["predicted_peak_bytes"] / result["peak_bytes"] - 1) < 0.05
    assert {t.dtype for t in load_file(tmp_path / "run" / "tightfit.safetensors").values()} == {torch.float32}


def test_nothing_is_written_before_the_input_is_found_good(folder, tmp_path):
    for methods in (["Lora", "Lora"], [{"Lora": {"where": "no_such_layer"}}]):
        entries = [{m: {}} if isinstance(m, str) else m for m in methods]
        with pytest.raises((ValueError, TypeError)):
            train(recipe_file(folder, entries, tmp_path / "run"))
        assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_names_the_step_and_keeps_the_checkpoints(folder, tmp_path, monkeypatch):
    from tightfit.train import trainer

    def poisoned(self, model, inputs, *args, **kwargs):
        loss = trainer.Trainer.compute_loss(self, model, inputs, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 3 else loss

    monkeypatch.setattr(trainer.RunTrainer, "compute_loss", poisoned)
    with pytest.raises(TrainingError, match="step 4: the loss is nan"):
        train(recipe_file(folder, [], tmp_path / "run", save_every=2))
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["checkpoint-2"]


def test_out_of_memory_is_a_failed_run(folder, tmp_path, monkeypatch):
    from tightfit.train import trainer

    def full(self, *args, **kwargs):
        torch.empty(2**62 // 4)  # more than any machine has

    monkeypatch.setattr(trainer.RunTrainer, "compute_loss", full)
    with pytest.raises(TrainingError, match=r"out of memory: .*batch_size"):
        train(recipe_file(folder, [], tmp_path / "run"))


def test_a_skeleton_plans_like_the_model(folder):
    file = recipe_file(folder, [{"PartialEmbedding": {}}, {"Checkpointing": {}}])
    prepared = prepare(file)
    plans = []
    for model in (build_model(file, prepared.data), build_skeleton(file, prepared.data)):
        recipe = filled(file.recipe, prepared, model)
        assert all(t.unfilled() is None for t in recipe)
        plans.append(plan_run(file, prepared, recipe, model))
    assert plans[0].peak_bytes == plans[1].peak_bytes and plans[0].recipe == plans[1].recipe


def test_a_training_step_keeps_nothing(folder):
    file = recipe_file(folder)
    data = prepare(file).data
    applied = tightfit.apply(build_model(file, data), None)
    step = training_step(applied, longest_batch(data, 4), file.train)
    before = [p.detach().clone() for p in applied.parameters()]
    assert step() is None
    assert all(p.grad is None for p in applied.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, applied.parameters()))


def test_metrics_file_survives_a_torn_line(tmp_path):
    for step in range(4):
        append_line(tmp_path / "metrics.jsonl", {"step": step, "grad_norm": float("inf")})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert [r["step"] for r in read_metrics(tmp_path)] == [0, 1, 2, 3]
    rewind_metrics(tmp_path, 1)
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        {"step": 0, "grad_norm": None},
        {"step": 1, "grad_norm": None},
    ]


def test_a_line_that_finds_space_for_a_part_of_it_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_line(path, {"step": 0})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, before[1]))
    try:
        with pytest.raises(OSError) as caught:
            append_line(path, {"step": 1})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert is_no_space(caught.value)
    assert [r["step"] for r in read_metrics(tmp_path)] == [0]


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"no run is in this folder"):
        write_report(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ArtifactError, match="damaged"):
        write_report(tmp_path)


def test_an_output_that_is_a_file(folder, tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(RecipeError, match="is a file"):
        train(recipe_file(folder, [], tmp_path / "run"))


finite = st.floats(-1e6, 1e6, allow_subnormal=False)


@given(st.lists(st.tuples(finite, finite), min_size=1, max_size=20))
def test_every_plot_is_well_formed_and_inside_its_frame(points):
    root = tree.fromstring(line_plot(points, x_label="a<b", y_label="c&d"))
    line = next(element for element in root if element.tag.endswith("polyline"))
    for pair in line.attrib["points"].split():
        x, y = map(float, pair.split(","))
        assert -0.1 <= x <= 640.1 and -0.1 <= y <= 300.1


@given(finite, st.floats(1e-3, 1e6))
def test_ticks_span_the_data(low, spread):
    found = ticks(low, low + spread)
    assert found[0] <= low + spread * 1e-6 and found[-1] >= low + spread * (1 - 1e-6) and len(found) <= 13
