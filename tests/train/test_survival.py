"""Runs of the real command that are killed, interrupted, or run out of disk or memory."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from run_server import Command, Server
from runs import project
from transformers import BertConfig, BertForMaskedLM

from tightfit.train import checkpoints
from tightfit.train.folder import read_metrics
from tightfit.train.recipe_file import read_recipe_file

SETTINGS = ("train.save_every=2", "train.logging_steps=1")
"""Ten steps, five checkpoints."""
SAME_BYTES = ("tightfit.safetensors", "recipe.json", "optimizer.safetensors", "state.json")
EVENTS = (".checkpoint-", "checkpoint-", "metrics.jsonl", ".run.json.", "run.json", ".metrics.jsonl.", ".recipe.yaml.")
EVENTS += (".tightfit.safetensors.", ".recipe.json.", "README.md", "report.html")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("logs")) as server:
        yield server


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return project(tmp_path_factory.mktemp("survival"))


@pytest.fixture(scope="module")
def whole(server, made):
    """A run that nothing disturbed, with all of its checkpoints; and the seconds it took."""
    started = time.monotonic()
    code, said = server.run(*command(made, made / "whole"), keep_all=True, modules=True)
    assert code == 0 and "CPUAllocator" not in said and "Traceback" not in said, said
    return made / "whole", time.monotonic() - started


def command(made, output, *more):
    return ("train", made / "recipe.yaml", f"output={output}", *SETTINGS, *more)


def names_in(folder: Path) -> set[str]:
    found: set[str] = set()
    for place in (folder, folder / "checkpoints"):
        try:
            found |= set(os.listdir(place))
        except FileNotFoundError:
            continue
    return found


def bytes_in(folder: Path) -> int:
    total = 0
    for file in folder.glob(".checkpoint-*/*"):
        try:
            total += file.stat().st_size
        except FileNotFoundError:
            continue
    return total


def kill_somewhere(running: Command, folder: Path, draw: random.Random, seconds: float, full: int) -> bool:
    """Kill a run at a random time, a little after something appears in its folder, or in the middle of a checkpoint.

    Returns whether it was killed, and not done before.
    """
    kind = draw.choice(["time", "event", "bytes", "bytes"])
    event, delay = draw.choice(EVENTS), draw.uniform(0, 0.02)
    until, part = draw.uniform(0, seconds), draw.uniform(0, 1) * full
    there = names_in(folder)
    while running.running():
        if kind == "time":
            due = time.monotonic() - running.started > until
        elif kind == "event":
            due = any(name.startswith(event) for name in names_in(folder) - there)
        else:
            due = bytes_in(folder / "checkpoints") > part
        if due:
            if kind == "event":
                time.sleep(delay)
            running.kill()
            return True
        time.sleep(0.0002)
    return False


def steps_seen(folder: Path) -> list[int]:
    return sorted(int(m[1]) for name in names_in(folder) if (m := re.fullmatch(r"checkpoint-(\d+)", name)))


def same_checkpoints(whole: Path, cut: Path) -> list[int]:
    """The steps of a run's complete checkpoints, each seen to hold the bytes of the undisturbed run's."""
    steps = []
    for path in checkpoints.checkpoints(cut / "checkpoints"):
        for name in SAME_BYTES:
            assert (path / name).read_bytes() == (whole / "checkpoints" / path.name / name).read_bytes(), path / name
        json.loads((path / "trainer_state.json").read_text())
        steps.append(int(path.name.rpartition("-")[2]))
    return steps


def same_run(whole: Path, cut: Path) -> None:
    assert (cut / "tightfit.safetensors").read_bytes() == (whole / "tightfit.safetensors").read_bytes()
    dropped = {f"checkpoint-{step}" for step in steps_seen(whole)[:-2]}
    assert names_in(cut) == names_in(whole) - dropped
    results = [json.loads((folder / "run.json").read_text())["result"] for folder in (whole, cut)]
    assert results[0]["metrics"] == results[1]["metrics"] and results[0]["steps"] == results[1]["steps"]
    losses = [{(r["step"], k): r[k] for r in read_metrics(f) for k in r if k.endswith("loss")} for f in (whole, cut)]
    assert losses[0] == losses[1]


def killed_until_done(server, made, whole, cut, draw, kills, more=()) -> tuple[int, int]:
    """A run killed up to `kills` times, then left to end; returns the kills, and those while one was written."""
    folder, seconds = whole
    full = sum(f.stat().st_size for f in (folder / "checkpoints" / "checkpoint-2").iterdir())
    killed = inside = newest = 0
    while killed < kills:
        running = server.start(*command(made, cut, *more, *(["--resume"] if cut.exists() else [])))
        hit = kill_somewhere(running, cut, draw, seconds, full)
        code, said = running.wait()
        if code == 0:  # it ended before the blow
            break
        assert hit and code == -signal.SIGKILL, said
        resumed = re.search(r"resuming from .*checkpoint-(\d+)", said)
        assert int(resumed[1]) == newest if resumed else newest == 0 or "resuming" not in said, said
        killed += 1
        inside += any(name.startswith(".checkpoint-") for name in names_in(cut))
        found = same_checkpoints(folder, cut)
        lost = [step for step in steps_seen(cut) if step not in found]
        assert not lost, f"torn checkpoints are seen: {lost}"
        assert max(found, default=0) >= newest, "a complete checkpoint was lost"
        newest = max(found, default=0)
    code, said = server.run(*command(made, cut, *more, "--resume"))
    assert code == 0, said
    same_run(folder, cut)
    return killed, inside


def test_a_run_killed_again_and_again_ends_on_the_same_bits(server, made, whole, tmp_path):
    draw, killed, runs = random.Random(3), 0, 0
    while killed < 2:
        runs += 1
        killed += killed_until_done(server, made, whole, tmp_path / f"cut-{runs}", draw, kills=2)[0]
        assert runs < 20


def interrupted(server, made, output, number, wait_for="checkpoint-2", *more) -> str:
    """Start a run, send it a signal once a name appears in its folder; returns what it said."""
    running = server.start(*command(made, output, *more))
    while running.running() and wait_for not in names_in(output):
        time.sleep(0.0005)
    running.kill(number)
    code, said = running.wait()
    assert code == {signal.SIGINT: 130, signal.SIGTERM: 143}[number], said
    return said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_saves_and_the_run_goes_on_to_the_same_bits(server, made, whole, tmp_path, number):
    said = interrupted(server, made, tmp_path / "cut", number)
    stopped = re.search(r"stopped at step (\d+); go on with --resume", said)
    assert stopped and "stopping after this step" in said and "Traceback" not in said, said
    saved = checkpoints.checkpoints(tmp_path / "cut" / "checkpoints")
    assert saved[-1].name == f"checkpoint-{stopped[1]}"
    code, said = server.run(*command(made, tmp_path / "cut", "--resume"))
    assert code == 0 and f"checkpoint-{stopped[1]}" in said, said
    assert (tmp_path / "cut/tightfit.safetensors").read_bytes() == (whole[0] / "tightfit.safetensors").read_bytes()


def test_no_space_for_a_checkpoint(server, made, whole, tmp_path):
    """A file-size limit gives the same kind of error as a full disk, inside the libraries that write."""
    folder, cut = whole[0], tmp_path / "cut"
    interrupted(server, made, cut, signal.SIGTERM)
    before = checkpoints.checkpoints(cut / "checkpoints")[-1]
    limit = (folder / "checkpoints" / "checkpoint-2" / "optimizer.safetensors").stat().st_size - 1
    code, said = server.run(*command(made, cut, "--resume"), file_bytes=limit)
    line = said.splitlines()[-1]
    assert code == 1 and "Traceback" not in said, said
    found = re.search(rf"no space left in {cut}/checkpoints: the checkpoint of step \d+ needs ([\d,]+) bytes", line)
    assert found and "are free there" in line and "--resume" in line, said
    real = sum(f.stat().st_size for f in (folder / "checkpoints" / "checkpoint-2").iterdir())
    assert 0.7 * real < int(found[1].replace(",", "")) <= real
    assert checkpoints.checkpoints(cut / "checkpoints")[-1] == before
    assert not [n for n in names_in(cut) if n.startswith(".")]
    code, said = server.run(*command(made, cut, "--resume"))
    assert code == 0, said
    assert (cut / "tightfit.safetensors").read_bytes() == (folder / "tightfit.safetensors").read_bytes()


@pytest.mark.slow
def test_memory_that_cannot_be_allocated(server, tmp_path):
    """A real refusal of the allocator: the process may not grow as far as the step needs."""
    made = project(tmp_path / "made")
    torch.manual_seed(0)
    config = BertConfig.from_pretrained(made / "model")
    config.intermediate_size = 100_000
    BertForMaskedLM(config).save_pretrained(made / "model")
    output = tmp_path / "run"
    code, said = server.run(*command(made, output, "train.batch_size=40"), address_bytes=300_000_000)
    line = said.splitlines()[-1]
    assert code == 1 and "Traceback" not in said, said
    assert re.search(r"out of memory: .*can't allocate memory.*; the plan said [\d.]+ MiB", line), said
    planned, found = (float(mib) for mib in re.findall(r"(?:said|\(predicted) ([\d.]+) MiB", line))
    assert 0 < found <= 0.75 * planned, said
    assert f"tightfit train {output}/cheaper.yaml" in line, said
    file = read_recipe_file(output / "cheaper.yaml")
    assert file.methods or file.train.gradient_accumulation > 1
    assert file.output == tmp_path / "run-cheaper"


RECIPES = {"stock": [], "SparseAdapter": ["methods=[{SparseAdapter: {width: 64, top_k: 4}}]"]}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_many_kills(server, made, tmp_path, recipe):
    more = ["train.gradient_accumulation=2", "train.epochs=4"] * bool(RECIPES[recipe]) + RECIPES[recipe]
    started = time.monotonic()
    arguments = command(made, tmp_path / "whole", *more)
    code, said = server.run(*arguments, keep_all=True, modules=True)
    assert code == 0, said
    whole = tmp_path / "whole", time.monotonic() - started
    draw, killed, inside, runs = random.Random(7), 0, 0, 0
    while killed < 20:
        runs += 1
        cut = tmp_path / f"cut-{runs}"
        found = killed_until_done(server, made, whole, cut, draw, kills=5, more=more)
        killed, inside = killed + found[0], inside + found[1]
    print(f"{recipe}: {killed} kills in {runs} runs, {inside} of them while a checkpoint was written")
    assert inside >= 3
