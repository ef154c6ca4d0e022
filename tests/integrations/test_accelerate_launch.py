"""`accelerate launch` itself: a user's script and the command on two processes, as on one, stopped and taken up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import models
import pytest
import torch
from integration_cases import tokenizer
from safetensors.torch import load_file
from test_two_lines import SCRIPTS, documented, rows_for, with_lines

pytestmark = pytest.mark.slow

LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
"""On a machine without a GPU as well; `--cpu` starts one process whatever is asked for, unless MPI starts them."""
TOLERANCE = 1e-4
"""Of a weight, as a share of the largest change that training made in its tensor."""
EPOCHS, STEPS = 10, 40

RECIPE = """\
model: base
task: sequence-classification
data: {{train: train.jsonl, eval: train.jsonl, text: [text], label: label}}
methods: [{{TokenTune: {{ratio: 0.5}}}}]
train:
  {{epochs: {epochs}, batch_size: {size}, learning_rate: 0.1, optimizer: sgd, scheduler: constant, max_length: 32,
    save_every: 2, logging_steps: 1}}
output: out
"""


def child(command: list[str], folder: Path) -> subprocess.Popen:
    """A process in a folder, told to use the CPU and one thread, with settings of nobody else."""
    own = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    own["CUDA_VISIBLE_DEVICES"] = ""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")} | own
    with (folder / "said.txt").open("a") as said:
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", *command],
            cwd=folder,
            env=environment,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def ended(process: subprocess.Popen, folder: Path, timeout: float = 240) -> int:
    """The exit code; nothing that it started is left."""
    try:
        code = process.wait(timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError((folder / "said.txt").read_text()[-4000:]) from None
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    return code


def finished(command: list[str], folder: Path) -> None:
    code = ended(child(command, folder), folder)
    assert code == 0, (folder / "said.txt").read_text()[-4000:]


def begun(folder: Path, size: int) -> Path:
    """A folder with a model without dropout, rows, the script and the recipe; `size` rows on each process."""
    folder.mkdir()
    torch.manual_seed(0)
    models.bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    (folder / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows_for("trainer.py")))
    script = (SCRIPTS / "trainer.py").read_text(encoding="utf-8")
    (folder / "script.py").write_text(with_lines(script, documented()["trainer.py"]))
    (folder / "recipe.yaml").write_text(RECIPE.format(size=size, epochs=EPOCHS))
    return folder


def script(size: int, *more: str) -> list[str]:
    """The user's script with its settings; the loss is a mean over rows, so nothing is to be counted over processes."""
    settings = {"output_dir": "out", "per_device_train_batch_size": size, "num_train_epochs": EPOCHS}
    settings |= {"learning_rate": 0.1, "optim": "sgd", "lr_scheduler_type": "constant", "seed": 3, "save_steps": 2}
    settings |= {"average_tokens_across_devices": False, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    return ["script.py", *(part for key, value in settings.items() for part in (f"--{key}", str(value))), *more]


def command(size: int, *more: str) -> list[str]:
    """The command; the number of rows stands in its recipe."""
    return ["-m", "tightfit", "train", "recipe.yaml", *more]


CASES = {
    "script": (
        script,
        "result/model.safetensors",
        "out/checkpoint-2",
        ["--resume_from_checkpoint", "out/checkpoint-2"],
    ),
    "command": (command, "out/tightfit.safetensors", "out/checkpoints/checkpoint-2", ["--resume"]),
}


@pytest.mark.parametrize("case", CASES)
def test_two_launched_processes_train_as_one_and_are_taken_up(case, tmp_path):
    call, result, first_checkpoint, resume = CASES[case]
    alone, both, cut = begun(tmp_path / "alone", 8), begun(tmp_path / "both", 4), begun(tmp_path / "cut", 4)
    finished(call(8), alone)
    finished([*LAUNCH, *call(4)], both)
    wanted, found = load_file(alone / result), load_file(both / result)
    before = load_file(alone / "base" / "model.safetensors")
    assert list(found) == list(wanted)
    moved = {name: float((wanted[name] - value).abs().max()) for name, value in before.items()}
    floor = 0.01 * max(moved.values())
    gaps = {name: float((found[name] - wanted[name]).abs().max()) / max(moved[name], floor) for name in before}
    assert max(gaps.values()) < TOLERANCE, gaps
    assert all(torch.equal(found[name], value) for name, value in wanted.items() if name not in before)
    assert left_by(both) == left_by(alone)
    if case == "command":
        steps = [[json.loads(line).get("step") for line in (f / "out/metrics.jsonl").open()] for f in (alone, both)]
        assert steps[0] == steps[1]

    process = child([*LAUNCH, *call(4)], cut)
    waited = time.monotonic()
    while not (cut / first_checkpoint).exists() and process.poll() is None and time.monotonic() - waited < 200:
        time.sleep(0.01)
    if case == "script":
        time.sleep(0.2)  # the Trainer writes a checkpoint file by file
    process.send_signal(signal.SIGTERM)
    assert ended(process, cut) == 1, (cut / "said.txt").read_text()[-4000:]
    said = (cut / "said.txt").read_text()
    assert "got signal: 15" in said
    assert not (cut / result).exists()
    if case == "command":
        assert said.count("go on with --resume") == 1
    finished([*LAUNCH, *call(4, *resume)], cut)
    again = load_file(cut / result)
    assert list(again) == list(found) and all(torch.equal(again[name], value) for name, value in found.items())
    assert left_by(cut) == left_by(both)


def left_by(folder: Path) -> set[str]:
    """The files of a run; each process's random numbers are in a file of its own, which the Trainer writes."""
    files = {str(path.relative_to(folder)) for name in ("out", "result") for path in (folder / name).rglob("*")}
    return {name for name in files if "rng_state" not in name}
