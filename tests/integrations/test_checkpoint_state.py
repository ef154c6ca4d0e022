"""What others' checkpoints hold of a recipe, and what is said when they do not hold enough."""

from __future__ import annotations

import json
import re

import models
import peft
import pytest
import torch
from integration_cases import assert_same_weights, batches_of, copied, quiet, rows_of, stock
from integration_runs import Keeps
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments

import tightfit
from tightfit import (
    Checkpointing,
    LadderSide,
    LearnableMemory,
    Lora,
    PartialEmbedding,
    RecurrentMemory,
    SparseAdapter,
    TokenTune,
    Velora,
    WtaCrs,
)
from tightfit.core.weights import FILE


def run(model, applied, folder, *, resume=None, rate=1e-2, **more):
    """The weights after the last of four steps, and the Trainer."""
    keeps = Keeps()
    settings = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": rate, "save_steps": 2, **more}
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **quiet(**settings)),
        train_dataset=rows_of(stock("vit" if "vit" in model.config.model_type else "bert"), 8),
        eval_dataset=rows_of(stock("vit" if "vit" in model.config.model_type else "bert"), 4, seed=1),
        callbacks=[keeps] if applied is None else [applied.callback(), keeps],
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return keeps.last, trainer


@pytest.mark.parametrize("restored", [False, True])
def test_directions_and_draws_go_with_the_trainers_checkpoints(restored, tmp_path):
    recipe, ends = [Velora(groups=8, where="*.value"), WtaCrs(min_rows=4, where="*.dense", scores="running")], []
    for resume in (None, tmp_path / "checkpoint-2"):
        model = stock("bert")
        applied = tightfit.apply(model, recipe)
        ends.append(run(model, applied, tmp_path, resume=resume, restore_callback_states_from_checkpoint=restored)[0])
        assert applied.state_dict()
    assert_same_weights(ends[1], ends[0])


def test_a_run_that_began_without_a_recipe_goes_on_with_one(tmp_path):
    """As after one that ran out of memory; it saves on, too."""
    plain, _ = run(stock("bert"), None, tmp_path)
    model = stock("bert")
    resumed, _ = run(model, tightfit.apply(model, Checkpointing()), tmp_path, resume=tmp_path / "checkpoint-2")
    assert_same_weights(resumed, plain)
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["RecipeCallback"]["attributes"]["saved"]["step"] == 4


def adapted(seed=1):
    torch.manual_seed(seed)
    return peft.get_peft_model(stock("bert"), peft.LoraConfig(r=2, target_modules=["query", "value"]))


def test_beside_adapters_the_trainer_writes_what_the_recipe_added(tmp_path):
    """Of a PEFT model the Trainer writes the adapters only."""
    ends = []
    for resume in (None, tmp_path / "checkpoint-2"):
        model = adapted()
        applied = tightfit.apply(model, RecurrentMemory(tokens=2, segment=4))
        ends.append(run(model, applied, tmp_path, resume=resume)[0])
        assert (tmp_path / "checkpoint-2" / FILE).exists()
    assert_same_weights(ends[1], ends[0])


def taken_up(make, recipe, folder, **more):
    """The weights at the end of an unbroken run, and of one that goes on from its first checkpoint."""
    ends = []
    for resume in (None, folder / "checkpoint-2"):
        model = make()
        ends.append(run(model, tightfit.apply(model, recipe), folder, resume=resume, **more)[0])
    return ends


@pytest.mark.parametrize(
    "fields", [{}, *(pytest.param(f, marks=pytest.mark.slow) for f in ({"groups": 4}, {"store": "disk"}))], ids=str
)
def test_rows_in_host_memory_beside_the_users_adapters_are_resumed(fields, tmp_path):
    """They, and Adam's state of them, are in none of the Trainer's own files."""
    whole, again = taken_up(adapted, SparseAdapter(width=96, top_k=8, **fields), tmp_path)
    assert any(name.endswith("sparse_rows.exp_avg") for name in whole)
    assert_same_weights(again, whole)


def test_rows_in_host_memory_of_a_vit_are_resumed(tmp_path):
    whole, again = taken_up(lambda: stock("vit"), SparseAdapter(width=96, top_k=8), tmp_path)
    assert_same_weights(again, whole)


@pytest.mark.parametrize("lost", [r".*", r"HostRows/training/"])
def test_a_run_that_lost_its_rows_does_not_go_on(lost, tmp_path):
    model = adapted()
    run(model, tightfit.apply(model, SparseAdapter(width=96, top_k=8)), tmp_path)
    file = tmp_path / "checkpoint-2" / FILE
    left = {name: tensor for name, tensor in load_file(file).items() if not re.match(lost, name)}
    save_file(left, file)
    model = adapted()
    applied = tightfit.apply(model, SparseAdapter(width=96, top_k=8))
    with pytest.raises(tightfit.StateError, match=r"HostRows/t.* have not the values of the checkpoint"):
        run(model, applied, tmp_path, resume=tmp_path / "checkpoint-2")


def test_the_best_rows_come_back_beside_adapters(tmp_path):
    model = adapted()
    applied = tightfit.apply(model, SparseAdapter(width=96, top_k=8))
    saved = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "rate": 1.0}
    saved |= {"metric_for_best_model": "loss", "greater_is_better": False}
    last, trainer = run(model, applied, tmp_path, **saved)
    assert trainer.state.best_global_step == 2
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-5)
    assert any(not torch.equal(copied(model)[name], last[name]) for name in last if name.endswith("rows"))


def test_the_best_weights_of_a_vit_come_back(tmp_path):
    """Its checkpoints have older names, which the Trainer does not read again."""
    model = stock("vit")
    applied = tightfit.apply(model, LearnableMemory(tokens=2))
    saved = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "rate": 1.0}
    saved |= {"metric_for_best_model": "loss", "greater_is_better": True}  # so that the best is not the last
    last, trainer = run(model, applied, tmp_path, **saved)
    assert trainer.state.best_global_step == 2
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-5)
    now = copied(model)
    assert any(not torch.equal(now[name], value) for name, value in last.items())


def test_a_run_that_lost_its_weights_does_not_go_on(tmp_path):
    model = stock("vit")
    run(model, tightfit.apply(model, LearnableMemory(tokens=2)), tmp_path)
    (tmp_path / "checkpoint-2" / FILE).unlink()
    model = stock("vit")
    applied = tightfit.apply(model, LearnableMemory(tokens=2))
    with pytest.raises(tightfit.StateError, match=r"have not the values of the checkpoint"):
        run(model, applied, tmp_path, resume=tmp_path / "checkpoint-2")


def test_a_stock_checkpoint_gets_no_file_more(tmp_path):
    model = stock("bert")
    run(model, tightfit.apply(model, TokenTune(ratio=0.5)), tmp_path)
    assert not (tmp_path / "checkpoint-2" / FILE).exists()
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    saved = state["stateful_callbacks"]["RecipeCallback"]["attributes"]["saved"]
    assert saved["step"] == 2
    assert set(saved["trained"]) == {name for name, p in model.named_parameters() if p.requires_grad}


def test_the_state_of_another_recipe_is_refused():
    one, other = (tightfit.apply(stock("bert"), r) for r in (TokenTune(ratio=0.5), Velora(groups=8)))
    with pytest.raises(tightfit.StateError, match=r"Tuner/tensors/step belong to another recipe; this one is .*Velora"):
        other.load_state_dict(one.state_dict())


def test_adapters_that_would_not_train_are_refused_before_anything():
    model = adapted()
    before = copied(model)
    with pytest.raises(tightfit.ConflictError, match=r"LadderSide and the model's own PEFT adapters both take over"):
        tightfit.apply(model, LadderSide())
    assert tightfit.plan(model, LadderSide(), batch=(2, 8)).conflicts
    assert_same_weights(copied(model), before)
    for parameter in model.parameters():
        parameter.requires_grad_(False)  # adapters that are only used
    tightfit.apply(model, LadderSide())


@pytest.mark.parametrize("recipe", [Lora(rank=2), SparseAdapter(width=96, top_k=8)], ids=["Lora", "SparseAdapter"])
def test_what_peft_froze_or_replaced_is_told(recipe):
    applied = tightfit.apply(stock("bert"), recipe)
    model = peft.get_peft_model(applied.model, peft.LoraConfig(r=2, target_modules=["query", "value"]))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**batches_of(stock("bert"), 1)[0]).loss.backward()
    before = copied(model)
    with pytest.raises(tightfit.StateError, match=r"SGD: parameters that the recipe .* frozen or replaced since"):
        optimizer.step()
    assert_same_weights(copied(model), before)


def test_some_frozen_parameters_are_the_users_choice():
    applied = tightfit.apply(stock("bert"), Lora(rank=2))
    first = next(p for n, p in applied.model.named_parameters() if "lora_A" in n)
    first.requires_grad_(False)
    optimizer = applied.optimizer(torch.optim.SGD, lr=0.1)
    applied.model(**batches_of(stock("bert"), 1)[0]).loss.backward()
    optimizer.step()


def test_generated_tokens_outside_the_kept_ones_are_read_again():
    """The head still knows every token, so a model may emit one that no batch may hold."""
    plain, model = stock("t5"), stock("t5")
    applied = tightfit.apply(model, PartialEmbedding(ids=models.kept_ids(model), head="split", force=True))
    batch = {k: v for k, v in models.batch(plain).items() if k != "labels"}
    wanted = {"max_new_tokens": 12, "suppress_tokens": list(models.kept_ids(plain))}
    expected, found = (m.eval().generate(**batch, **wanted) for m in (plain, model))
    assert torch.equal(found, expected)
    assert set(found.flatten().tolist()) - set(models.kept_ids(plain)), "no token outside the kept ones was chosen"
    with pytest.raises(tightfit.UnknownTokenError, match="outside the kept"):
        model(input_ids=torch.tensor([[70, 80]]), labels=torch.tensor([[9, 10]]))
    applied.remove()


@pytest.mark.parametrize("fields", [{}, {"scores": "running"}], ids=str)
def test_row_sampling_under_the_users_own_adapters(fields):
    """As under Lora in the same recipe: the adapters' layers are sampled."""
    mine = applied_layers(tightfit.apply(adapted(), WtaCrs(min_rows=4, **fields)))
    torch.manual_seed(1)
    theirs = applied_layers(
        tightfit.apply(stock("bert"), [Lora(rank=2, where="query|value"), WtaCrs(min_rows=4, **fields)])
    )
    assert mine == theirs > 0


def applied_layers(applied):
    return applied.report()["methods"]["WtaCrs"]["layers"]
