"""TokenTune inside training: the Trainer, accumulation, several processes, autocast, other methods beside it."""

from __future__ import annotations

import copy
import logging
import os
from pathlib import Path

import models
import pytest
import token_tune_cases as cases
import torch
import torch.distributed as dist
import transformers as hf
from checks.state import gradients
from torch import nn

import tightfit
from tightfit import Checkpointing, FusedOps, Lora, Mesa, PartialEmbedding, TokenTune, WtaCrs, chain
from tightfit.methods.token_tune import calls


def small(name):
    return cases.build(name).float()


def total(grads):
    return torch.cat([g.flatten() for _, g in sorted(grads.items())])


def train(model, folder, applied, rows, **options):
    arguments = hf.TrainingArguments(
        output_dir=folder,
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        **options,
    )
    callbacks = [] if applied is None else [applied.callback()]
    trainer = hf.Trainer(model=model, args=arguments, train_dataset=rows, callbacks=callbacks)
    trainer.train()
    return trainer


def examples(model, count=8):
    inputs = cases.batch(model, "right", rows=count)
    return [{k: v[i] for k, v in inputs.items()} for i in range(count)]


def test_accumulated_micro_batches_weigh_by_their_targets(tmp_path):
    """Where all tokens are selected, the Trainer's accumulated step is the stock one."""
    found = []
    for recipe in (None, TokenTune(count=16)):
        model = small("llama")
        applied = None if recipe is None else tightfit.apply(model, recipe)
        train(model, tmp_path, applied, examples(model), gradient_accumulation_steps=2, optim="sgd", seed=1)
        if applied is not None:
            applied.remove()
        found.append(model.state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-5)


def test_the_trainers_count_of_all_targets_does_not_shrink_the_gradient():
    model = small("llama")
    inputs = cases.batch(model, None)
    every = int((torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:] != -100).sum())
    pos = torch.tensor([[0, 3, 5, 8]] * 3)
    with tightfit.apply(model, TokenTune(ratio=0.4)):
        alone = model(**inputs, token_positions=pos).loss
        told = model(**inputs, token_positions=pos, num_items_in_batch=every).loss
        half = model(**inputs, token_positions=pos, num_items_in_batch=torch.tensor(2 * every)).loss
    torch.testing.assert_close(told, alone)
    torch.testing.assert_close(half, alone / 2)


def test_all_is_the_mean_over_all_targets_on_average():
    model = small("llama")
    inputs = cases.batch(model, "right")
    with torch.no_grad():
        full = float(model(**inputs).loss)
    found = []
    with tightfit.apply(model, TokenTune(ratio=0.5, normalise="all")):
        for _ in range(40):
            found.append(float(model(**inputs).loss.detach()))
    found = torch.tensor(found)
    error = (found.mean() - full).abs() / (found.std() / len(found) ** 0.5)
    assert error < 4
    assert found.std() > 1e-3


def test_a_classifier_trains_through_the_trainer(tmp_path):
    model = small("bert-class")
    applied = tightfit.apply(model, chain(TokenTune(count=4), Lora(rank=2)))
    trainer = train(model, tmp_path, applied, examples(model), eval_strategy="no")
    assert trainer.label_names == ["labels"]
    stock = trainer.evaluate(examples(model))["eval_loss"]
    merged = applied.merge()
    inputs = cases.batch(model, "right", rows=8)
    merged.eval()
    assert float(merged(**inputs).loss.detach()) == pytest.approx(stock, abs=1e-5)


@pytest.mark.slow
def test_label_smoothing_by_the_trainer(tmp_path):
    """It takes the labels away and wants logits for all tokens: those of unselected ones are constants."""
    model = small("llama")
    applied = tightfit.apply(model, TokenTune(ratio=0.5))
    before = copy.deepcopy(model.state_dict())
    train(model, tmp_path, applied, examples(model), label_smoothing_factor=0.1)
    assert any(not torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_trainer_that_calls_the_backbone_itself():
    """As TRL does: hidden states of all tokens come back, gradients go through the selected ones."""
    model = small("llama")
    inputs = cases.batch(model)
    labels = inputs.pop("labels")
    with tightfit.apply(model, TokenTune(ratio=0.5)):
        hidden = model.model(**inputs, use_cache=False).last_hidden_state
        assert hidden.shape[:2] == labels.shape
        loss = torch.nn.functional.cross_entropy((hidden @ model.lm_head.weight.t()).flatten(0, 1), labels.flatten())
        loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["llama", "bert-class"])
def test_autocast_keeps_the_gradients(name):
    """The first run casts weights without gradients; were these casts kept, the weights would get none."""
    model = small(name)
    inputs = cases.batch(model)
    pos = cases.positions(model, inputs)
    call = inputs | {"token_positions": pos}
    with tightfit.apply(model, TokenTune(ratio=0.5)):
        _, plain = gradients(model, call)
        _, mixed = gradients(model, call, autocast=True)
        model.activation_checkpointing_enable({"use_reentrant": False})
        _, again = gradients(model, call, autocast=True)
    assert set(mixed) == set(plain)
    assert (total(mixed) - total(plain)).norm() < 0.05 * total(plain).norm()
    torch.testing.assert_close(total(again), total(mixed), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "bert", "vit"])
def test_bfloat16_weights(name):
    model = cases.build(name).bfloat16()
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in cases.batch(model).items()}
    with tightfit.apply(model, TokenTune(ratio=0.5)):
        loss, grads = gradients(model, inputs)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(g).all() for g in grads.values())


@pytest.mark.parametrize(
    "others",
    [
        [Mesa(attention=True)],
        [FusedOps(), Mesa(attention=True)],
        [FusedOps(), Mesa(attention=True), Checkpointing()],
        [WtaCrs(min_rows=64)],
        [FusedOps(), WtaCrs(min_rows=64)],
        [PartialEmbedding(ids=tuple(range(50)), force=True), FusedOps()],
    ],
    ids=lambda others: str(chain(*others)),
)
@pytest.mark.parametrize("name", ["llama", pytest.param("bert-class", marks=pytest.mark.slow)])
def test_beside_other_methods(name, others):
    model = small(name)
    inputs = cases.batch(model)
    call = inputs | {"token_positions": cases.positions(model, inputs)}
    with tightfit.apply(model, TokenTune(ratio=0.5)):
        loss, wanted = gradients(model, call)
    with tightfit.apply(model, chain(TokenTune(ratio=0.5), *others)):
        other_loss, found = gradients(model, call)
    torch.testing.assert_close(other_loss, loss)
    limit = 0.05 if any(isinstance(o, Mesa) for o in others) else 1e-5
    assert (total(found) - total(wanted)).norm() < limit * total(wanted).norm()


def test_a_vocabulary_that_lacks_ids_passes_the_check():
    model = models.build("llama")
    recipe = chain(PartialEmbedding(ids=models.kept_ids(model), force=True), TokenTune(ratio=0.5))
    with tightfit.apply(model, recipe):
        model(**models.batch(model)).loss.backward()


def test_rows_of_one_token_and_rows_of_padding_only():
    for name in ("llama", "bert", "gpt2"):
        model = small(name)
        inputs = cases.batch(model, "right")
        inputs["attention_mask"][1] = 0
        inputs["attention_mask"][2] = torch.arange(10) < 1
        inputs["labels"] = inputs["labels"].masked_fill(inputs["attention_mask"] == 0, -100)
        with tightfit.apply(model, TokenTune(ratio=0.5)):
            loss, grads = gradients(model, inputs)
            assert torch.isfinite(loss)
            assert all(torch.isfinite(g).all() for g in grads.values())
            inputs["labels"][:] = -100
            loss, grads = gradients(model, inputs)
            assert loss == 0
            assert len(grads) == len(list(model.parameters()))


@pytest.mark.parametrize("policy", ["random", "suffix"])
def test_a_classifier_trains_through_the_token_it_reads(policy):
    model = small("llama-class")
    model.config.pad_token_id = 2
    inputs = cases.batch(model, "right")
    for row, length in enumerate(inputs["attention_mask"].sum(1)):
        inputs["input_ids"][row, length - 2 :] = 2  # texts end with separators, whose id is that of padding too
    _, wanted = gradients(model, inputs)
    with tightfit.apply(model, TokenTune(count=2, policy=policy)):
        for _ in range(5):
            _, grads = gradients(model, inputs)
            assert all(g.abs().max() > 0.01 * wanted[n].abs().max() for n, g in grads.items() if "down_proj" in n)


@pytest.mark.parametrize("policy", ["random", "labelled", "suffix", "block", "score", "bernoulli"])
@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(n, marks=pytest.mark.slow) for n in ("bert", "llama-class", "vit"))]
)
def test_every_policy_trains(name, policy):
    model = small(name)
    inputs = cases.batch(model)
    applied = tightfit.apply(model, TokenTune(ratio=0.5, policy=policy))
    optimizer = applied.optimizer(torch.optim.SGD, lr=0.05)
    losses = []
    for _ in range(6):
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            losses.append(float(model(**inputs).loss))
    assert losses[-1] < losses[0]


def test_scores_of_the_caller_are_followed():
    model = small("llama")
    inputs = cases.batch(model, None)
    scores = torch.zeros(3, 10)
    scores[:, [2, 4, 6]] = 1.0
    wanted = torch.tensor([[0, 2, 4, 6, 9]] * 3)
    with tightfit.apply(model, TokenTune(count=5, policy="score")):
        _, found = gradients(model, inputs | {"token_scores": scores})
        _, expected = gradients(model, inputs | {"token_positions": wanted})
        _, own = gradients(model, inputs)
    torch.testing.assert_close(total(found), total(expected))
    assert not torch.allclose(total(own), total(expected))


def test_dropout_is_warned_of_once(caplog):
    calls._warn_of_dropout.cache_clear()
    model = models.build("bert", dropout=0.1)
    with caplog.at_level(logging.WARNING), tightfit.apply(model, TokenTune(ratio=0.5)):
        for _ in range(2):
            model(**models.batch(model)).loss.backward()
    assert len([r for r in caplog.records if "has dropout" in r.message]) == 1


def test_ignored_labels_of_an_encoder_decoder_are_its_padding():
    model = models.build("bart", dropout=0.0)
    applied = tightfit.apply(model, TokenTune(count=3, policy="suffix"))
    batch = models.batch(model, size=1)
    labels = batch["labels"][:, :6]
    given = {"input_ids": batch["input_ids"]}
    short = model(**given, labels=labels).loss
    padded = model(**given, labels=torch.nn.functional.pad(labels, (0, 5), value=-100)).loss
    assert applied.report()["methods"]["TokenTune"]["length"] == 11
    torch.testing.assert_close(padded, short)


def ddp_worker(rank, folder):
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0", GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(Path(folder) / "store"), 2), rank=rank, world_size=2)
    model = small("llama")
    applied = tightfit.apply(model, TokenTune(ratio=0.5, policy="labelled"))
    wrapped = nn.parallel.DistributedDataParallel(model)
    inputs = cases.batch(model, seed=rank)
    if rank == 1:
        inputs["labels"][:] = -100  # a rank without targets must not hang the others
    for _ in range(2):
        wrapped(**inputs).loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    torch.save((grads, applied.report()["methods"]["TokenTune"]["step"]), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes(tmp_path):
    torch.multiprocessing.spawn(ddp_worker, args=(str(tmp_path),), nprocs=2)
    (first, step), (second, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert step == 2
    model = small("llama")
    with tightfit.apply(model, TokenTune(ratio=0.5, policy="labelled")):
        inputs = cases.batch(model, seed=0)
        for _ in range(2):
            model(**inputs).loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], parameter.grad / 2, rtol=1e-4, atol=1e-6)
