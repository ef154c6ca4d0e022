"""Checkpoints as a bad disk or another hand would leave them: resumed from, or refused by one clear error."""

from __future__ import annotations

import json
import shutil

import models
import pytest
import torch
from fuzzing import amounts, as_json, changed_documents, damaged_bytes, draw_cases, works_or_is_refused
from hypothesis import strategies as st
from transformers.trainer_callback import TrainerState

import tightfit
from tightfit.core.errors import ArtifactError
from tightfit.train import checkpoints

STEP = 2
FILES = [checkpoints.STATE_FILE, checkpoints.TRAINER_FILE, checkpoints.OPTIMIZER_FILE]


def begun():
    """A recipe, its optimizer and its scheduler, as a run has them before it resumes."""
    applied = tightfit.apply(models.build("bert"), tightfit.Lora(rank=2))
    optimizer = applied.optimizer(lr=1e-3)
    return applied, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    applied, optimizer, scheduler = begun()
    for _ in range(STEP):
        applied.model(**models.batch(applied.model)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    state = TrainerState(global_step=STEP, max_steps=4, epoch=0.5, log_history=[{"step": 1, "loss": 0.5}])
    return checkpoints.write_checkpoint(
        tmp_path_factory.mktemp("run"),
        applied,
        step=STEP,
        trainer_state=state,
        optimizer=optimizer,
        scheduler=scheduler,
        random_states=[checkpoints.random_state()],
    )


def zero_gradients(applied):
    for parameter in applied.model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)


def resume(path, fresh):
    state = checkpoints.trainer_state(path)
    skipped = checkpoints.restore(path, *fresh)
    checkpoints.restore_random(path, 0, 1)
    return state.global_step, skipped


@pytest.fixture
def check(good, tmp_path):
    """Resumes from the checkpoint with another content in one file; what is resumed from can be trained."""
    path, before = tmp_path / good.name, checkpoints.random_state()
    shutil.copytree(good, path)
    applied, optimizer, scheduler = begun()

    def with_content(pair):
        name, content = pair
        (path / name).write_bytes(content)
        try:
            found = works_or_is_refused(lambda: resume(path, (applied, optimizer, scheduler)))
        finally:
            shutil.copy(good / name, path / name)
            checkpoints.set_random_state(before)
        if found is not None:
            assert found[0] == STEP
            zero_gradients(applied)
            optimizer.step()
            scheduler.step()

    return with_content


def test_a_good_one(good):
    applied, optimizer, scheduler = begun()
    assert resume(good, (applied, optimizer, scheduler)) == (STEP, 0)
    assert scheduler.last_epoch == STEP and all("exp_avg" in state for state in optimizer.state.values())
    zero_gradients(applied)
    optimizer.step()
    assert all(float(state["step"]) == STEP + 1 for state in optimizer.state.values())


@amounts(60, 600)
def test_changed_documents(good, check, cases):
    few = {name: json.loads((good / name).read_text()) for name in FILES[:2]}
    few[checkpoints.STATE_FILE]["random"][0]["python"][1] = [0] * 625  # one number is as another
    few[checkpoints.STATE_FILE]["random"][0]["numpy"][1] = [0] * 624
    documents = [st.tuples(st.just(name), changed_documents(st.just(few[name])).map(as_json)) for name in few]
    draw_cases(cases, st.one_of(documents), check)


@amounts(40, 400)
def test_damaged_files(good, check, cases):
    contents = [st.tuples(st.just(name), damaged_bytes(st.just((good / name).read_bytes()))) for name in FILES]
    draw_cases(cases, st.one_of(contents), check)


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("optimizer", "param_groups", 0, "lr"), "fast", "param_groups.0.lr is 'fast'"),
        (("scheduler", "last_epoch"), None, "scheduler.last_epoch is None"),
        (("random", 0, "torch"), "AAAA", "damaged"),
        (("tightfit_checkpoint",), 7, "is not a checkpoint of format"),
    ],
)
def test_what_is_said(good, tmp_path, place, value, words):
    path = tmp_path / good.name
    shutil.copytree(good, path)
    document = json.loads((path / checkpoints.STATE_FILE).read_text())
    holder = document
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    (path / checkpoints.STATE_FILE).write_text(json.dumps(document))
    with pytest.raises(ArtifactError, match=words):
        resume(path, begun())


def test_an_optimizer_tensor_of_another_name_is_refused(good, tmp_path):
    path = tmp_path / good.name
    shutil.copytree(good, path)
    content = (path / checkpoints.OPTIMIZER_FILE).read_bytes()
    (path / checkpoints.OPTIMIZER_FILE).write_bytes(content.replace(b'"0.exp_avg_sq"', b'"0.exp_avg_s6"'))
    with pytest.raises(ArtifactError, match="other names than were written"):
        resume(path, begun())
