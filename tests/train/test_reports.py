"""What a run says of its steps: in its lines, its log file, trackers, and through a Trainer of the user's own."""

import functools

import pytest
import torch
from runs import recipe_file
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

import tightfit
from tightfit.core import memory
from tightfit.core.errors import RecipeError
from tightfit.core.reports import StepReports
from tightfit.train.bench import training_step
from tightfit.train.folder import read_metrics
from tightfit.train.run import train

pytestmark = pytest.mark.usefixtures("light_garbage")

FIGURES = {"peak_bytes", "saved_bytes", "tokens_per_second", "predicted_peak_bytes"}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


class Collects(TrainerCallback):
    """What a tracker gets."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def rows_of(count, length=16):
    ids = torch.arange(count * length).reshape(count, length) % 80 + 5
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": torch.tensor(0)} for row in ids]


def own_trainer(folder, applied, callbacks, **arguments):
    settings = {"max_steps": 6, "logging_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-3}
    arguments = settings | {"report_to": "none", "use_cpu": True, "disable_tqdm": True} | arguments
    options = TrainingArguments(str(folder), save_strategy="no", **arguments)
    return Trainer(model=applied.model, args=options, train_dataset=rows_of(32), callbacks=callbacks)


def model_of():
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SIZES, vocab_size=100, max_position_embeddings=32))


def test_a_run_reports_each_logged_step(folder, tmp_path):
    heard = []
    result = train(recipe_file(folder, [], tmp_path / "run", logging_steps=2, epochs=1), echo=heard.append)
    rows = [row for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert [row["step"] for row in rows] == [2, 4] and all(row.keys() >= FIGURES for row in rows)
    assert all(row["predicted_peak_bytes"] == result.predicted_peak_bytes for row in rows)
    assert all(0 < row["saved_bytes"] < row["peak_bytes"] < 1.1 * result.peak_bytes for row in rows)
    assert all(row["tokens_per_second"] > 0 for row in rows)
    lines = [line for line in heard if ": loss " in line]
    assert len(lines) == 2 and lines[0].startswith("step 2 of 5, epoch 0.40: loss ")
    for words in ("peak 0.1 MiB (predicted 0.1 MiB)", "saved 0.1 MiB", "tokens/s"):
        assert words in lines[0], lines[0]


@pytest.mark.parametrize("recipe", [None, tightfit.Mesa(), tightfit.Lora(rank=2), tightfit.Checkpointing()], ids=str)
def test_the_figures_are_those_of_measure(tmp_path, recipe):
    model = model_of()
    batch = {key: torch.stack([row[key] for row in rows_of(4)]) for key in rows_of(1)[0]}
    plan = tightfit.plan(model, recipe, batch=batch)
    applied, collected = tightfit.apply(model, recipe), Collects()
    trainer = own_trainer(tmp_path, applied, [applied.callback(plan), collected])
    trainer.train()
    logs = [entry for entry in collected.logs if "loss" in entry]
    assert len(logs) == 3 and all(entry.keys() >= FIGURES for entry in logs)
    assert [e["peak_bytes"] for e in trainer.state.log_history if "loss" in e] == [e["peak_bytes"] for e in logs]
    assert not model._forward_hooks and not model._forward_pre_hooks and not memory.running_profiles
    trainer.optimizer = trainer.lr_scheduler = trainer.callback_handler.optimizer = None
    trainer.accelerator.free_memory()
    section = recipe_file(tmp_path, learning_rate=1e-3).train
    step = training_step(applied, batch, section)
    step()
    assert logs[-1]["saved_bytes"] == memory.saved_bytes(step)
    assert logs[-1]["peak_bytes"] == pytest.approx(plan.peak_bytes, rel=0.03) == logs[-1]["predicted_peak_bytes"]


def test_tokens_per_second_is_tokens_over_seconds(tmp_path, monkeypatch):
    from tightfit.core import reports

    clock = {"now": 0.0}
    monkeypatch.setattr(reports.time, "perf_counter", lambda: clock["now"])
    real = BertForSequenceClassification.forward

    @functools.wraps(real)
    def forward(self, *args, **kwargs):
        clock["now"] += 0.5
        return real(self, *args, **kwargs)

    model = model_of()
    applied, collected = tightfit.apply(model, None), Collects()
    monkeypatch.setattr(BertForSequenceClassification, "forward", forward)
    trainer = own_trainer(tmp_path, applied, [applied.callback(), collected], gradient_accumulation_steps=2)
    trainer.train()
    logs = [entry for entry in collected.logs if "loss" in entry]
    assert [entry["tokens_per_second"] for entry in logs] == [4 * 16 / 0.5] * 3
    assert "predicted_peak_bytes" not in logs[0]


def test_by_the_epoch_and_the_first_step(tmp_path):
    applied, collected = tightfit.apply(model_of(), None), Collects()
    options = {"logging_strategy": "epoch", "max_steps": 16, "logging_first_step": True}
    own_trainer(tmp_path, applied, [applied.callback(), collected], **options).train()
    logs = [entry for entry in collected.logs if "loss" in entry]
    assert len(logs) == 3 and all("peak_bytes" in entry for entry in logs)


def test_a_step_that_raises_leaves_no_profile_behind(tmp_path, monkeypatch):
    model = model_of()
    applied = tightfit.apply(model, None)
    trainer = own_trainer(tmp_path, applied, [applied.callback()], logging_steps=1)
    monkeypatch.setattr(Trainer, "compute_loss", lambda self, *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert tightfit.measure(lambda: torch.ones(64, requires_grad=True).exp().sum().backward()).saved_bytes == 256
    monkeypatch.undo()
    trainer.train()
    assert not memory.running_profiles and not model._forward_hooks
    monkeypatch.setattr(Trainer, "compute_loss", lambda self, *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    tightfit.apply(model_of(), None)  # what goes on recording takes ever more memory
    assert not memory.running_profiles and not torch.autograd._profiler_enabled()


def test_with_the_users_own_profile(tmp_path):
    applied, collected = tightfit.apply(model_of(), None), Collects()
    trainer = own_trainer(tmp_path, applied, [applied.callback(), collected])
    with memory.allocation_profile():
        trainer.train()
    assert "saved_bytes" in collected.logs[0] and "peak_bytes" not in collected.logs[0]


def test_a_plan_that_is_none():
    applied = tightfit.apply(model_of(), None)
    for wrong in ("8GiB", True, 1.5):
        with pytest.raises(TypeError, match=r"callback\(plan=\.\.\.\): got .*accepted is a Plan"):
            applied.callback(wrong)


def test_images_have_rows():
    reports = StepReports(tightfit.apply(model_of(), None))
    pace = reports._plain
    pace.add([], {"pixel_values": torch.ones(3, 3, 4, 4), "labels": torch.ones(3)})
    pace.end(1.5)
    assert pace.rates(2) == {"rows_per_second": 4.0}


def test_reports_change_no_bit(tmp_path):
    states = []
    for reported in (True, False):
        model = model_of()
        applied = tightfit.apply(model, tightfit.Mesa())
        callbacks = [applied.callback()] if reported else []
        own_trainer(tmp_path, applied, callbacks, logging_steps=1).train()
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_tensorboard(folder, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(recipe_file(folder, [], tmp_path / "run", logging_steps=2, max_steps=4, report_to=["tensorboard"]))
    events = EventAccumulator(str(tmp_path / "run" / "logs"))
    events.Reload()
    rows = [row for row in read_metrics(tmp_path / "run") if "loss" in row]
    for name in FIGURES:
        scalars = events.Scalars(f"train/{name}")
        assert [s.step for s in scalars] == [2, 4]
        assert [s.value for s in scalars] == pytest.approx([row[name] for row in rows], rel=1e-6)


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_other_trackers_offline(folder, tmp_path, name, monkeypatch):
    pytest.importorskip(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    seen = Collects()
    from tightfit.train import trainer

    real = trainer.trackers
    monkeypatch.setattr(trainer, "trackers", lambda *a: [*real(*a), seen])
    train(recipe_file(folder, [], tmp_path / "run", logging_steps=2, max_steps=2, report_to=[name]))
    assert seen.logs[0].keys() >= FIGURES


def test_a_tracker_that_is_not_there(folder, tmp_path):
    with pytest.raises(RecipeError, match=r"train.report_to: tensorbored is not installed, or transformers knows no"):
        train(recipe_file(folder, [], tmp_path / "run", report_to=["tensorbored"]))
    assert not (tmp_path / "run").exists()
