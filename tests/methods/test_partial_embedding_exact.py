"""The input side of PartialEmbedding is lossless: forward, gradients and training equal the stock run's bit for bit."""

import copy

import models
import pytest
import torch
from partial_embedding_cases import (
    CLASSIFIERS,
    LANGUAGE_MODELS,
    dropped,
    flipped,
    hidden_states,
    objective,
    own_loss,
    pair,
    rows,
    same_parameters,
    table,
    train,
)

import tightfit
from tightfit import Checkpointing, PartialEmbedding

FAMILIES = tuple(models.FAMILIES)


def adamw(parameters, decay=0.0):
    return torch.optim.AdamW(parameters, lr=3e-3, weight_decay=decay)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padding", ["right", "left"])
def test_hidden_states_are_equal_in_evaluation(family, padding):
    stock, applied = pair(family)
    batch = models.batch(stock)
    batch = flipped(batch) if padding == "left" else batch
    with torch.no_grad():
        expected, found = (hidden_states(model.eval(), batch) for model in (stock, applied.model))
    assert len(expected) == len(found) > 2
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_kept_rows_are_equal(family):
    stock, applied = pair(family)
    batch = models.batch(stock)
    for model in (stock, applied.model):
        torch.manual_seed(7)
        objective(model, batch).backward()
    full = table(stock).grad
    assert torch.equal(table(applied.model).grad, rows(full, applied))
    assert not dropped(full, applied).any()
    assert full.any()


@pytest.mark.parametrize(("family", "clip"), [*((family, None) for family in FAMILIES), ("bert", 0.5), ("t5", 0.5)])
def test_training_is_equal_bit_for_bit(family, clip):
    stock, applied = pair(family, dropout=0.1)
    before = dropped(table(stock).detach().clone(), applied)
    batches = [models.batch(stock, seed=step) for step in range(20 if family == "bert" else 3)]
    expected = train(stock, batches, adamw(stock.parameters()), clip=clip)
    found = train(applied.model, batches, adamw(applied.parameters()), clip=clip)
    if clip is None:
        assert found == expected
        same_parameters(stock, applied)
    else:  # the norm sums fewer zeros, so its last bit may differ
        assert found == pytest.approx(expected, rel=1e-5)
        same_parameters(stock, applied, rtol=1e-4)
    assert torch.equal(dropped(table(stock), applied), before)


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_a_classifier_trains_equally_on_its_own_loss(family):
    stock, applied = pair(family, dropout=0.1)
    batches = [models.batch(stock, seed=step) for step in range(8)]
    expected = train(stock, batches, adamw(stock.parameters()), loss=own_loss)
    assert train(applied.model, batches, adamw(applied.parameters()), loss=own_loss) == expected
    assert expected[0] != expected[-1]
    same_parameters(stock, applied)
    applied.remove()
    assert all(torch.equal(a, b) for a, b in zip(stock.state_dict().values(), applied.model.state_dict().values()))


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_a_language_model_trains_closely_with_its_full_head(family):
    """Only the chunked loss differs, by rounding; the untied table shrinks, the tied one stays whole."""
    stock, applied = pair(family, dropout=0.1, head="full")
    assert len(table(applied.model)) == (62 if family == "llama" else 120)
    batches = [models.batch(stock, seed=step) for step in range(3)]
    expected = train(stock, batches, adamw(stock.parameters()), loss=own_loss)
    found = train(applied.model, batches, adamw(applied.parameters()), loss=own_loss)
    assert found == pytest.approx(expected, rel=1e-5)


def test_weight_decay_moves_dropped_rows_only_in_the_stock_run():
    stock, applied = pair("bert", dropout=0.1)
    before = table(stock).detach().clone()
    batches = [models.batch(stock, seed=step) for step in range(6)]
    expected = train(stock, batches, adamw(stock.parameters(), 0.1))
    assert train(applied.model, batches, adamw(applied.parameters(), 0.1)) == expected
    same_parameters(stock, applied)
    shrunk = dropped(before, applied) * (1 - 3e-3 * 0.1) ** 6
    torch.testing.assert_close(dropped(table(stock).detach(), applied), shrunk, rtol=1e-5, atol=0)
    assert torch.equal(
        dropped(applied.stock_state_dict()["bert.embeddings.word_embeddings.weight"], applied), dropped(before, applied)
    )


@pytest.mark.parametrize("adopted", [True, False])
def test_decay_dropped_reproduces_the_stock_decay(adopted):
    stock, applied = pair("bert", dropout=0.1, decay_dropped=True)
    ids = PartialEmbedding.of(applied).dropped
    batches = [models.batch(stock, seed=step) for step in range(6)]
    ours = applied.optimizer(lr=3e-3, weight_decay=0.1) if adopted else adamw(applied.model.parameters(), 0.1)
    optimizers = (adamw(stock.parameters(), 0.1), ours)
    for model, optimizer in zip((stock, applied.model), optimizers):
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=6)
        for batch in batches:
            train(model, [batch], optimizer)
            schedule.step()
    same_parameters(stock, applied)
    applied.remove()
    torch.testing.assert_close(table(applied.model)[ids], table(stock)[ids], rtol=1e-5, atol=0)


def test_decay_dropped_counts_for_each_table_by_its_own_group(tmp_path):
    """The table decays, the bias of the head does not; a head that is frozen does not either."""
    model = models.build("llama", dropout=0.0)
    model.lm_head.weight.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    applied = tightfit.apply(model, PartialEmbedding(ids=models.kept_ids(model), decay_dropped=True))
    optimizer = applied.optimizer(lr=0.1, weight_decay=0.5)
    train(model, [models.batch(model)] * 2, optimizer, loss=own_loss)
    away = PartialEmbedding.of(applied).dropped
    applied.save(tmp_path)
    state = applied.stock_state_dict()
    torch.testing.assert_close(
        state["model.embed_tokens.weight"][away], before["model.embed_tokens.weight"][away] * 0.95**2
    )
    assert torch.equal(state["lm_head.weight"], before["lm_head.weight"])
    # the factor travels with the artifact, and ends when a stock state is loaded
    twin = models.build("llama", dropout=0.0)
    twin.lm_head.weight.requires_grad_(False)
    again = tightfit.load(twin, tmp_path)
    assert torch.equal(again.stock_state_dict()["model.embed_tokens.weight"], state["model.embed_tokens.weight"])
    twin.load_state_dict(state)
    assert torch.equal(again.stock_state_dict()["model.embed_tokens.weight"], state["model.embed_tokens.weight"])


def test_a_step_without_gradients_decays_no_dropped_rows():
    model = models.build("bert")
    before = table(model).detach().clone()
    applied = tightfit.apply(model, PartialEmbedding(ids=models.kept_ids(model), decay_dropped=True))
    applied.optimizer(lr=0.1, weight_decay=0.5).step()
    applied.remove()
    assert torch.equal(table(model), before)


def test_the_order_of_the_ids_cannot_matter():
    stock = models.build("bert", dropout=0.0)
    states = []
    for ids in (models.kept_ids(stock), reversed(models.kept_ids(stock)), torch.tensor(models.kept_ids(stock)).flip(0)):
        model = copy.deepcopy(stock)
        applied = tightfit.apply(model, PartialEmbedding(ids=ids))
        train(model, [models.batch(model)] * 3, applied.optimizer(lr=1e-2))
        states.append(applied.remove().state_dict())
    assert all(torch.equal(a, b) for other in states[1:] for a, b in zip(states[0].values(), other.values()))


@pytest.mark.parametrize("family", FAMILIES)
def test_ties_are_kept_and_parameters_fall_by_the_dropped_rows(family):
    stock, applied = pair(family)
    model, saved_rows = applied.model, 120 - len(PartialEmbedding.of(applied).ids)
    tables = 2 if family == "llama" else 1
    biases = family in ("bert-mlm", "roberta-mlm")
    expected = sum(p.numel() for p in stock.parameters()) - saved_rows * (32 * tables + biases)
    assert sum(p.numel() for p in model.parameters()) == expected
    by_object = lambda m: [[n for n, p in m.named_parameters(remove_duplicate=False) if p is q] for q in m.parameters()]  # noqa: E731
    assert by_object(model) == by_object(stock)
    if family in ("t5", "bart"):
        inner = model if family == "t5" else model.model
        assert inner.shared.weight is inner.encoder.embed_tokens.weight is inner.decoder.embed_tokens.weight
        assert inner.shared.weight is model.lm_head.weight


@pytest.mark.parametrize("family", ["bert", "roberta-mlm", "t5"])
def test_gradients_add_up_over_micro_batches(family):
    stock, applied = pair(family, dropout=0.0)
    for model in (stock, applied.model):
        for seed in range(2):
            objective(model, models.batch(stock, seed=seed)).backward()
    assert torch.equal(table(applied.model).grad, rows(table(stock).grad, applied))


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
def test_it_composes_with_checkpointing(family):
    stock, applied = pair(family, dropout=0.1, recipe=[Checkpointing()])
    stock.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batch = models.batch(stock)
    for model in (stock, applied.model):
        torch.manual_seed(3)
        objective(model, batch).backward()
    assert torch.equal(table(applied.model).grad, rows(table(stock).grad, applied))


@pytest.mark.parametrize("family", FAMILIES)
def test_autocast_is_equal(family):
    stock, applied = pair(family, dropout=0.0)
    batch = models.batch(stock)
    for model in (stock, applied.model):
        with torch.autocast("cpu", torch.bfloat16):
            loss = objective(model, batch)
        loss.backward()
    assert torch.equal(table(applied.model).grad, rows(table(stock).grad, applied))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_bfloat16_weights_are_equal(family, when):
    stock = models.build(family, dropout=0.0).to(torch.bfloat16 if when == "before" else torch.float32)
    model = copy.deepcopy(stock)
    applied = tightfit.apply(model, PartialEmbedding(ids=models.kept_ids(stock), head="split"))
    stock.to(torch.bfloat16), model.to(torch.bfloat16)
    batch = models.batch(stock)
    for each in (stock, model):
        objective(each, batch).backward()
    assert table(model).dtype == table(model).grad.dtype == torch.bfloat16
    assert torch.equal(table(model).grad, rows(table(stock).grad, applied))
    applied.remove()
    assert all(torch.equal(a, b) for a, b in zip(stock.state_dict().values(), model.state_dict().values()))
