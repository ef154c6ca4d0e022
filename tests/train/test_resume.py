import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from runs import project, recipe_file
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification
from transformers.trainer_callback import TrainerState

import tightfit
from tightfit import load
from tightfit.core.errors import ArtifactError, RecipeError, Terminated, TrainingError
from tightfit.train import callbacks, checkpoints, run, trainer
from tightfit.train.folder import held, read_metrics, read_run
from tightfit.train.run import prepare, train
from tightfit.train.stopping import StopRequest

pytestmark = pytest.mark.usefixtures("the_weights")


class Killed(Exception):
    pass


def stop_in_step(monkeypatch, number):
    """Stop a run in the middle of its n-th step, with no chance to write anything."""
    real = trainer.RunTrainer.training_step

    def step(self, *args, **kwargs):
        if self.state.global_step + 1 == number:
            raise Killed
        return real(self, *args, **kwargs)

    monkeypatch.setattr(trainer.RunTrainer, "training_step", step)


def small_bert():
    torch.manual_seed(0)
    # 64: narrower inputs are kept whole
    config = BertConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    return BertForSequenceClassification(config).train()


def small_batch(seed):
    ids = torch.randint(50, (4, 8), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": torch.arange(4) % 2}


def weights(path):
    return load_file(path / "tightfit.safetensors")


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


LORA = [{"Lora": {"rank": 2, "dropout": 0.2}}]
CASES = [
    ([], {"save_every": 3}, 8),  # in the middle of the second epoch
    ([], {}, 6),  # right after an epoch's end
    ([], {"save_every": 2, "eval_every": 3, "gradient_accumulation": 2}, 5),
    (LORA, {"save_every": 3, "scheduler": "cosine", "warmup_ratio": 0.3}, 8),
    ([{"Checkpointing": {}}], {"save_every": 4}, 6),
    ([], {"save_every": 3, "optimizer": "sgd", "max_steps": 7}, 5),
    ([], {"save_every": 3, "optimizer": "adafactor"}, 5),
    ([], {"save_every": 3, "optimizer": "adamw-fused", "group_by_length": True}, 8),
    ([], {"save_every": 2, "group_by_length": True, "gradient_accumulation": 2}, 5),
    ([{"PartialEmbedding": {}}], {"save_every": 3}, 8),
    ([{"SparseAdapter": {"width": 64, "top_k": 4}}], {"save_every": 3, "gradient_accumulation": 2}, 5),
]


@pytest.mark.parametrize(("methods", "settings", "killed_in"), CASES)
def test_a_resumed_run_ends_on_the_same_bits(folder, tmp_path, monkeypatch, methods, settings, killed_in):
    whole = train(recipe_file(folder, methods, tmp_path / "whole", **settings))
    file = recipe_file(folder, methods, tmp_path / "cut", **settings)
    with monkeypatch.context() as patch:
        stop_in_step(patch, killed_in)
        with pytest.raises(Killed):
            train(file)
    torch.manual_seed(99), random.seed(99), np.random.seed(99)  # another process would not share the state
    cut = train(file, resume=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert cut.metrics == whole.metrics and cut.steps == whole.steps
    evals = [[r for r in read_metrics(tmp_path / n) if "eval_loss" in r] for n in ("whole", "cut")]
    assert [(r["step"], r["eval_loss"]) for r in evals[0]] == [(r["step"], r["eval_loss"]) for r in evals[1]]


def test_the_recipes_train_something_and_dropout_matters(folder, tmp_path):
    """Guards the test above: if seeds made no difference, equal bits would show nothing."""
    one = train(recipe_file(folder, [], tmp_path / "one"))
    other = train(recipe_file(folder, [], tmp_path / "other", seed=1))
    assert not same(weights(one.output), weights(other.output))


def test_damaged_checkpoints_are_passed_over(folder, tmp_path, monkeypatch):
    whole = train(recipe_file(folder, [], tmp_path / "whole", save_every=2))
    file = recipe_file(folder, [], tmp_path / "cut", save_every=2)
    with monkeypatch.context() as patch:
        stop_in_step(patch, 8)
        with pytest.raises(Killed):
            train(file)
    saved = tmp_path / "cut" / "checkpoints"
    assert [p.name for p in checkpoints.checkpoints(saved)] == ["checkpoint-4", "checkpoint-6"]
    with (saved / "checkpoint-6" / "optimizer.safetensors").open("r+b") as file_:
        file_.truncate(100)
    (saved / ".checkpoint-8.abc").mkdir()  # what a process killed while writing leaves
    (saved / "checkpoint-100").mkdir()
    assert [p.name for p in checkpoints.checkpoints(saved)] == ["checkpoint-4"]
    heard = []
    train(file, resume=True, echo=heard.append)
    assert any("checkpoint-4" in line for line in heard)
    assert same(weights(whole.output), weights(tmp_path / "cut"))
    assert not (saved / ".checkpoint-8.abc").exists()


@pytest.mark.parametrize("name", ["optimizer.safetensors", "state.json", "recipe.json", "trainer_state.json"])
def test_a_checkpoint_with_other_bytes_is_refused(folder, tmp_path, monkeypatch, name):
    """In files that still can be read another bit would be other weights in the end."""
    file = recipe_file(folder, [], tmp_path / "run")
    with monkeypatch.context() as patch:
        stop_in_step(patch, 6)
        with pytest.raises(Killed):
            train(file)
    path = tmp_path / "run" / "checkpoints" / "checkpoint-5" / name
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=rf"checkpoint-5: .* \(ValueError: {name} holds other bytes .* remove that"):
        train(file, resume=True)


def test_no_checkpoint_yet_begins_again(folder, tmp_path, monkeypatch):
    whole = train(recipe_file(folder, [], tmp_path / "whole"))
    file = recipe_file(folder, [], tmp_path / "cut")
    with monkeypatch.context() as patch:
        stop_in_step(patch, 2)
        with pytest.raises(Killed):
            train(file)
    train(file, resume=True)
    assert same(weights(whole.output), weights(tmp_path / "cut"))
    steps = [row["step"] for row in read_metrics(tmp_path / "cut") if "loss" in row]
    assert steps == sorted(set(steps))


def test_resume_without_a_run_starts_one_and_a_finished_run_is_only_told(folder, tmp_path):
    file = recipe_file(folder, [], tmp_path / "run", max_steps=2)
    first = train(file, resume=True)
    heard = []
    again = train(file, resume=True, echo=heard.append)
    assert again == first and any("finished" in line for line in heard)
    (tmp_path / "run" / "recipe.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"recipe\.json: not valid JSON"):
        train(file, resume=True)


def test_a_changed_recipe_or_changed_data_is_refused(folder, tmp_path, monkeypatch):
    other = project(tmp_path)
    with monkeypatch.context() as patch:
        stop_in_step(patch, 6)
        with pytest.raises(Killed):
            train(recipe_file(other))
    with pytest.raises(RecipeError, match=r"train\.batch_size: is 4, the run in .* has 8"):
        train(recipe_file(other, batch_size=4), resume=True)
    with (other / "train.tsv").open("a") as file:
        file.write("one more\t1\n")
    with pytest.raises(RecipeError, match="the rows are not those"):
        train(recipe_file(other), resume=True)


@pytest.mark.parametrize("at", ["safetensors", "json", "metrics"])
def test_no_space_left_stops_the_run_and_keeps_earlier_checkpoints(folder, tmp_path, monkeypatch, at):
    file = recipe_file(folder, [], tmp_path / "run", save_every=2)
    whole = train(recipe_file(folder, [], tmp_path / "whole", save_every=2))
    target = {"safetensors": "save_file", "json": "write_text", "metrics": "append_line"}[at]
    full = OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        if at == "metrics":
            real = callbacks.append_line
            patch.setattr(callbacks, target, lambda p, v: _raise(full) if v["step"] > 5 else real(p, v))
        else:
            real = checkpoints.write_checkpoint

            def write(*args, step, **kwargs):
                if step > 4:
                    if at == "json":
                        patch.setattr(checkpoints, "write_text", lambda *a: _raise(full))
                    else:
                        patch.setattr("safetensors.torch.save_file", lambda *a: _raise(full))
                return real(*args, step=step, **kwargs)

            patch.setattr(checkpoints, "write_checkpoint", write)
        with pytest.raises(TrainingError, match=f"no space left in {tmp_path / 'run'}"):
            train(file)
    saved = tmp_path / "run" / "checkpoints"
    assert checkpoints.checkpoints(saved)[-1].name == "checkpoint-4"
    assert sorted(p.name for p in saved.iterdir()) == ["checkpoint-2", "checkpoint-4"]  # nothing half written
    train(file, resume=True)
    assert same(weights(whole.output), weights(tmp_path / "run"))


def _raise(error):
    raise error


def test_a_checkpoint_holds_no_pickle(folder, tmp_path):
    train(recipe_file(folder, [], tmp_path / "run", max_steps=2))
    kinds = {p.suffix for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert kinds == {".json", ".jsonl", ".yaml", ".safetensors", ".md", ".html"}


def test_optimizer_state_survives_and_what_cannot_be_written_is_refused(tmp_path):
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    tensors, rest = checkpoints.split_state(optimizer.state_dict())
    joined = checkpoints.join_state(tensors, json.loads(json.dumps(rest)))
    for index, entries in optimizer.state_dict()["state"].items():
        assert all(torch.equal(entries[key], joined["state"][index][key]) for key in entries)
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "state.json").write_text('{"tightfit_checkpoint": 1, "opt')
    with pytest.raises(ArtifactError, match="damaged"):
        checkpoints.read_state(tmp_path / "checkpoint-1")


def test_each_process_gets_its_own_scores_back(tmp_path):
    recipe = tightfit.WtaCrs(scores="running", min_rows=4)

    def process(seed, steps):
        applied = tightfit.apply(small_bert(), recipe)
        optimizer = applied.optimizer(lr=1e-3)
        for step in range(steps):
            applied.model(**small_batch(seed + step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return applied, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)

    (first, optimizer, scheduler), (second, *_) = process(0, 2), process(5, 2)
    kept = [first.state_dict(), second.state_dict()]
    assert kept[0].keys() == kept[1].keys() and len(kept[0]) > 0
    path = checkpoints.write_checkpoint(
        tmp_path,
        first,
        step=2,
        trainer_state=TrainerState(global_step=2, max_steps=4, epoch=0.5),
        optimizer=optimizer,
        scheduler=scheduler,
        random_states=[checkpoints.random_state()] * 2,
        kept=kept,
    )
    assert (path / "process-1.safetensors").exists() and not (path / "process-0.safetensors").exists()
    for number in (0, 1):
        applied = tightfit.load(small_bert(), path)
        optimizer = applied.optimizer(lr=1e-3)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        checkpoints.restore(path, applied, optimizer, scheduler, number)
        assert same(applied.state_dict(), kept[number]) and not same(applied.state_dict(), kept[1 - number])


def test_random_states_go_through_json():
    state = json.loads(json.dumps(checkpoints.random_state()))
    drawn = [torch.rand(3).tolist(), np.random.rand(3).tolist(), [random.random()]]
    checkpoints.set_random_state(state)
    assert drawn == [torch.rand(3).tolist(), np.random.rand(3).tolist(), [random.random()]]


@pytest.mark.parametrize(
    ("number", "step", "settings"),
    [
        (signal.SIGTERM, 4, {"eval_every": 2, "save_every": 4}),
        (signal.SIGINT, 3, {"eval_every": 3, "save_every": 4}),
        (signal.SIGTERM, 5, {}),
        (signal.SIGINT, 10, {}),
    ],
)
def test_a_signal_during_an_evaluation(folder, tmp_path, monkeypatch, number, step, settings):
    whole = train(recipe_file(folder, [], tmp_path / "whole", **settings))
    file = recipe_file(folder, [], tmp_path / "cut", **settings)
    real = trainer.RunTrainer.prediction_step

    def interrupt(self, *args, **kwargs):
        if self.state.global_step == step:
            os.kill(os.getpid(), number)
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.RunTrainer, "prediction_step", interrupt)
        with pytest.raises(KeyboardInterrupt) as stopped:
            train(file)
    assert getattr(stopped.value, "exit_code", 130) == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert checkpoints.checkpoints(tmp_path / "cut" / "checkpoints")[-1].name == f"checkpoint-{step}"
    assert signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL)
    cut = train(file, resume=True)
    assert same(weights(whole.output), weights(cut.output)) and cut.metrics == whole.metrics
    evals = [[r for r in read_metrics(tmp_path / n) if "eval_loss" in r] for n in ("whole", "cut")]
    assert [(r["step"], r["eval_loss"]) for r in evals[0]] == [(r["step"], r["eval_loss"]) for r in evals[1]]


def test_ctrl_c_twice_stops_at_once(folder, tmp_path, monkeypatch):
    real = trainer.RunTrainer.training_step

    def step(self, *args, **kwargs):
        for _ in range(2 if self.state.global_step == 2 else 0):
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(trainer.RunTrainer, "training_step", step)
    heard = []
    with pytest.raises(KeyboardInterrupt):
        train(recipe_file(folder, [], tmp_path / "run", save_every=2), echo=heard.append)
    assert [p.name for p in checkpoints.checkpoints(tmp_path / "run" / "checkpoints")] == ["checkpoint-2"]
    assert "stopping after this step; press Ctrl-C again to stop at once" in heard


def test_processes_agree_on_the_step_to_stop_after(monkeypatch):
    """One is told in the middle of a step, the other is not; a signal that comes meanwhile waits for the next step."""
    asked, seen = StopRequest(), []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)

    def all_reduce(tensor, op):
        seen.append(int(tensor))
        asked.receive(signal.SIGTERM)  # too late for this one

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    assert asked.agree(torch.device("cpu")) is False and asked
    assert asked.agree(torch.device("cpu")) is True and seen == [0, signal.SIGTERM]
    assert isinstance(asked.error(), Terminated)
    assert not asked.receive(signal.SIGTERM) and not asked.receive(signal.SIGINT)


def test_one_run_at_a_time_in_a_folder(folder, tmp_path, monkeypatch):
    file = recipe_file(folder, [], tmp_path / "run", max_steps=1)
    with held(file, resume=False):
        for resume in (False, True):
            with pytest.raises(RecipeError, match=f"another run is at work in {file.output}"):
                train(file, resume=resume)

    def while_another_begins(*args):
        (file.output / "recipe.yaml").write_text("model: another")
        return prepare(*args)

    monkeypatch.setattr(run, "prepare", while_another_begins)
    with pytest.raises(RecipeError, match="exists and is not empty"):
        train(file)
    assert [path.name for path in file.output.iterdir()] == ["recipe.yaml"]


def test_a_run_that_went_on_meanwhile_is_not_taken_back(folder, tmp_path, monkeypatch):
    file = recipe_file(folder, [], tmp_path / "run", max_steps=3, save_every=1)
    with monkeypatch.context() as patch:
        stop_in_step(patch, 2)
        with pytest.raises(Killed):
            train(file)
    saved = file.output / "checkpoints"
    (first,) = saved.iterdir()

    def while_another_goes_on(*args):
        shutil.copytree(first, saved / "checkpoint-2")
        return load(*args)

    monkeypatch.setattr(run, "load", while_another_goes_on)
    with pytest.raises(RecipeError, match=r"another run was at work in .*, by --resume once more"):
        train(file, resume=True)
    assert (saved / "checkpoint-2").is_dir()


@pytest.mark.parametrize("left", [["run.json"], ["run.json", ".recipe.yaml.abc"], [".run.json.abc"]])
def test_a_run_killed_before_its_recipe_file_begins_again(folder, tmp_path, left):
    known = read_run(train(recipe_file(folder, [], tmp_path / "one", max_steps=1)).output)
    file = recipe_file(folder, [], tmp_path / "run", max_steps=1)
    file.output.mkdir()
    for name in left:
        (file.output / name).write_text(json.dumps({**known, "result": None}))
    assert train(file, resume=True).steps == 1
    assert not [p for p in file.output.iterdir() if p.name.startswith(".")]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "run.json.txt").write_text("")
    with pytest.raises(RecipeError, match="no run folder"):
        train(recipe_file(folder, [], tmp_path / "other"), resume=True)


PROCESS = """
import os, signal, sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from pathlib import Path
from runs import recipe_file
from tightfit.train import trainer, run
real = trainer.RunTrainer.training_step
def step(self, *args, **kwargs):
    if self.state.global_step == {step}:
        os.kill(os.getpid(), signal.{signal})
    return real(self, *args, **kwargs)
trainer.RunTrainer.training_step = step
try:
    run.train(recipe_file(Path({folder!r}), [], {output!r}, save_every=3))
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "code", "newest"), [("SIGKILL", -9, 6), ("SIGINT", 130, 8)])
def test_a_process_that_is_killed_or_interrupted(folder, tmp_path, name, code, newest):
    output = str(tmp_path / "cut")
    tests = __file__.rsplit("/", 1)[0]
    script = PROCESS.format(tests=tests, step=7, signal=name, folder=str(folder), output=output)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    assert checkpoints.checkpoints(tmp_path / "cut" / "checkpoints")[-1].name == f"checkpoint-{newest}"
    whole = train(recipe_file(folder, [], tmp_path / "whole", save_every=3))
    train(recipe_file(folder, [], tmp_path / "cut", save_every=3), resume=True)
    assert same(weights(whole.output), weights(tmp_path / "cut"))


@pytest.mark.slow
def test_two_processes_share_a_run_and_resume_it(folder, tmp_path):
    from tightfit.train.recipe_file import read_recipe_file, write_recipe_file

    write_recipe_file(recipe_file(folder, [], tmp_path / "run", save_every=2), tmp_path / "recipe.yaml")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, "-m", "tightfit", "train", str(tmp_path / "recipe.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    first = weights(tmp_path / "run")
    rows = read_metrics(tmp_path / "run")
    assert [r["step"] for r in rows if "eval_loss" in r] == [3, 6]  # 40 rows, 2 x 8 a step, two epochs
    assert all(0.5 < r["eval_loss"] < 0.9 for r in rows if "eval_loss" in r)  # ln 2, not twice that
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-6")
    known = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps({**known, "result": None}))
    again = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=240)
    assert again.returncode == 0 and "checkpoint-4" in again.stderr, again.stderr
    assert same(first, weights(tmp_path / "run"))
    with pytest.raises(RecipeError, match="written by 2 processes"):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-6")
        (tmp_path / "run" / "run.json").write_text(json.dumps({**known, "result": None}))
        train(read_recipe_file(tmp_path / "recipe.yaml"), resume=True)


@pytest.mark.slow
def test_two_processes_are_told_to_stop_and_go_on(folder, tmp_path):
    from tightfit.train.recipe_file import write_recipe_file

    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    commands = {}
    for name in ("whole", "cut"):
        file = recipe_file(folder, [{"Lora": {"rank": 2}}], tmp_path / name, epochs=5, save_every=2)
        write_recipe_file(file, tmp_path / f"{name}.yaml")
        commands[name] = [*launch, "-m", "tightfit", "train", str(tmp_path / f"{name}.yaml")]
    process = subprocess.Popen(commands["cut"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    saved = tmp_path / "cut" / "checkpoints"
    waited = time.monotonic()
    while not (saved / "checkpoint-2").exists() and process.poll() is None and time.monotonic() - waited < 200:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=200)
    stopped = re.search(r"stopped at step (\d+); go on with --resume", said)
    assert process.returncode != 0 and stopped, said
    assert checkpoints.checkpoints(saved)[-1].name == f"checkpoint-{stopped[1]}"
    for name, more in (("whole", []), ("cut", ["--resume"])):
        done = subprocess.run([*commands[name], *more], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
