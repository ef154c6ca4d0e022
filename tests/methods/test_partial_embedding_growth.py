"""Ids outside the kept set, optimizers, and a vocabulary that grows while it trains."""

import gc

import models
import pytest
import torch
from partial_embedding_cases import hidden_states, objective, own_loss, pair, rows, same_parameters, table, train

import tightfit
from tightfit import PartialEmbedding, StateError, UnknownTokenError

FEW = (0, 1, 2, *range(9, 46), 102, 119)
MORE = range(5, 102)


def mixed(stock, steps=6):
    """Batches over the first ids, then over more of them."""
    return [models.batch(stock, seed=s, ids=FEW if s < steps // 2 else MORE) for s in range(steps)]


def adamw(parameters, decay=0.0, **settings):
    return torch.optim.AdamW(parameters, lr=3e-3, weight_decay=decay, **settings)


@pytest.mark.parametrize("adopted", [True, False])
@pytest.mark.parametrize("family", ["bert", "roberta-mlm", "gpt2", "llama", "t5", "bart"])
def test_growing_mid_run_is_the_full_run_bit_for_bit(family, adopted):
    stock, applied = pair(family, dropout=0.1, ids=FEW, unknown="grow")
    batches = mixed(stock)
    expected = train(stock, batches, adamw(stock.parameters()))
    optimizer = applied.optimizer(lr=3e-3, weight_decay=0.0) if adopted else adamw(applied.model.parameters())
    assert train(applied.model, batches, optimizer) == expected
    assert 42 < len(table(applied.model)) < 120
    same_parameters(stock, applied)
    applied.remove()
    assert all(torch.equal(a, b) for a, b in zip(stock.state_dict().values(), applied.model.state_dict().values()))


def test_growing_by_hand_between_backward_and_step():
    stock, applied = pair("bert", dropout=0.0, ids=FEW)
    vocabulary, optimizers = PartialEmbedding.of(applied), (adamw(stock.parameters()), applied.optimizer(lr=3e-3))
    optimizers[1].param_groups[0]["weight_decay"] = 0.0
    for step, batch in enumerate(mixed(stock, 4)):
        losses = [objective(m, batch) for m in (stock, applied.model)]  # kept alive over the growth
        assert losses[0].item() == losses[1].item()
        for loss in losses:
            loss.backward()
        if step == 1:
            assert vocabulary.grow(MORE) == 60
            assert vocabulary.grow(torch.tensor([5, 6])) == 0
        for optimizer in optimizers:
            optimizer.step(), optimizer.zero_grad()
    same_parameters(stock, applied)


def test_growing_with_weight_decay_is_close():
    stock, applied = pair("bert", dropout=0.0, ids=FEW, unknown="grow")
    expected = train(stock, mixed(stock), adamw(stock.parameters(), 0.01))
    found = train(applied.model, mixed(stock), applied.optimizer(lr=3e-3, weight_decay=0.01))
    # rows that join late were not shrunk by lr * decay in each of three steps
    assert found == pytest.approx(expected, rel=3 * 3e-3 * 0.01)


def test_growing_with_decay_dropped_takes_the_decayed_rows():
    stock, applied = pair("bert", dropout=0.0, ids=FEW, unknown="grow", decay_dropped=True)
    train(stock, mixed(stock), adamw(stock.parameters(), 0.3))
    train(applied.model, mixed(stock), applied.optimizer(lr=3e-3, weight_decay=0.3))
    applied.remove()
    torch.testing.assert_close(table(applied.model), table(stock), rtol=1e-5, atol=1e-7)


def test_growth_from_labels_only():
    """A T5 decoder reads ids that only the labels hold; a split head would keep their rows frozen."""
    for family in ("t5", "bart", "bert-mlm"):
        stock, applied = pair(family, dropout=0.0, ids=FEW, unknown="grow")
        batch = models.batch(stock, ids=FEW)
        batch["labels"][0, :3] = torch.tensor([70, 71, -100])
        torch.testing.assert_close(own_loss(applied.model, batch), own_loss(stock, batch), rtol=1e-6, atol=0)
        assert {70, 71} <= set(PartialEmbedding.of(applied).ids.tolist())


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adafactor, torch.optim.RMSprop, torch.optim.Adam])
def test_other_optimizers_follow_a_growing_table(optimizer):
    _, applied = pair("bert", dropout=0.0, ids=FEW, unknown="grow")
    settings = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    train(applied.model, mixed(applied.model), applied.optimizer(optimizer, lr=1e-3, **settings))
    assert len(table(applied.model)) > 42


def test_a_state_without_rows_is_refused_before_anything_changes():
    _, applied = pair("bert", ids=FEW)
    optimizer = applied.optimizer(lr=1e-3)
    weight = table(applied.model)
    optimizer.state[weight] = {"step": torch.tensor(1.0), "state1": torch.zeros(42, 32, dtype=torch.uint8)}
    with pytest.raises(
        StateError, match=r"cannot grow: AdamW keeps 'state1' of shape \(42, 32\).*uint8.*scan all data"
    ):
        PartialEmbedding.of(applied).grow([70])
    assert len(table(applied.model)) == len(PartialEmbedding.of(applied).ids) == 42


@pytest.mark.parametrize("ids", [[-1], [120], [3, 500]])
def test_growing_beyond_the_vocabulary_is_refused(ids):
    _, applied = pair("bert", unknown="grow")
    with pytest.raises(IndexError, match=r"must lie in \[0, 120\)"):
        PartialEmbedding.of(applied).grow(ids)


def test_the_recipe_and_report_follow_growth():
    _, applied = pair("bert", ids=FEW, unknown="grow")
    PartialEmbedding.of(applied).grow([70, 60])
    assert applied.recipe.transforms[0].ids == tuple(sorted((*FEW, 60, 70)))
    facts = applied.report()["methods"]["PartialEmbedding"]
    assert (facts["rows_kept"], facts["rows_stock"]) == (44, 120)
    assert facts["host_bytes"] == (120 - 44) * 32 * 4


# -- fetch ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tuple(models.FAMILIES))
def test_fetch_reads_unknown_rows_bit_for_bit(family):
    stock, applied = pair(family, dropout=0.0, unknown="fetch")
    batches = [models.batch(stock, seed=s) for s in range(2)]
    for model in (stock, applied.model):
        train(model, batches, adamw(model.parameters()))
    batch = models.batch(stock, ids=range(4, 118), seed=9)
    with torch.no_grad():
        expected, found = (hidden_states(m.eval(), batch) for m in (stock, applied.model))
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        if family in ("bert", "roberta"):
            assert torch.equal(stock(**batch).logits, applied.model(**batch).logits)
    assert len(table(applied.model)) == 62


def test_fetch_trains_kept_rows_only_where_asked():
    stock, applied = pair("bert", dropout=0.0, unknown="fetch")
    batch = models.batch(stock, ids=range(4, 118))
    with pytest.raises(UnknownTokenError, match="only reads; it cannot train rows"):
        applied.model(**batch)
    for model in (stock, applied.model):  # evaluation mode may still differentiate
        objective(model.eval(), batch).backward()
    assert torch.equal(table(applied.model).grad, rows(table(stock).grad, applied))
    table(applied.model).requires_grad_(False)
    table(stock).requires_grad_(False)
    assert torch.equal(*(objective(m.train(), batch) for m in (stock, applied.model)))


# -- optimizers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warm", [True, False])
@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_an_optimizer_built_before_is_handed_over(family, warm):
    stock, model = models.build(family, dropout=0.0), models.build(family, dropout=0.0)
    optimizers = [adamw(m.parameters(), amsgrad=True) for m in (stock, model)]
    batches = [models.batch(stock, seed=s) for s in range(4)]
    if warm:
        assert train(stock, batches, optimizers[0]) == train(model, batches, optimizers[1])
    applied = tightfit.apply(model, PartialEmbedding(ids=models.kept_ids(model), head="split"))
    assert applied.adopt(optimizers[1]) is optimizers[1]
    assert train(stock, batches, optimizers[0]) == train(model, batches, optimizers[1])
    same_parameters(stock, applied)
    held = optimizers[1].state[table(model)]
    assert held["exp_avg"].shape == held["max_exp_avg_sq"].shape == (62, 32)


def test_an_optimizer_not_handed_over_is_stopped():
    model = models.build("bert", dropout=0.0)
    optimizer = adamw(model.parameters())
    applied = tightfit.apply(model, PartialEmbedding(ids=models.kept_ids(model)))
    objective(model, models.batch(model)).backward()
    with pytest.raises(StateError, match=r"AdamW: param group 0 holds a parameter.*applied.adopt\(optimizer\)"):
        optimizer.step()
    applied.adopt(optimizer).step()


def test_state_bytes_fall_with_the_rows():
    _, applied = pair("bert", dropout=0.0)
    optimizer = applied.optimizer(lr=1e-3)
    train(applied.model, [models.batch(applied.model)], optimizer, loss=own_loss)
    moments = sum(v.numel() for s in optimizer.state.values() for v in s.values() if v.dim())
    assert moments == 2 * sum(p.numel() for p in applied.model.parameters())


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
def test_decay_dropped_needs_decoupled_decay(optimizer):
    _, applied = pair("bert", decay_dropped=True)
    message = f"decay_dropped=True.*{optimizer.__name__} moves unused rows"
    with pytest.raises(ValueError, match=message):
        applied.optimizer(optimizer, lr=0.1)
    objective(applied.model, models.batch(applied.model)).backward()
    with pytest.raises(ValueError, match=message):  # handed over or not
        optimizer(applied.model.parameters(), lr=0.1).step()


def test_no_hook_outlives_the_recipe():
    from torch.optim.optimizer import _global_optimizer_pre_hooks as hooks

    gc.collect()
    before = len(hooks)
    _, applied = pair("bert")
    assert len(hooks) > before
    applied.remove()
    assert len(hooks) == before
    _, applied = pair("bert")
    del applied
    gc.collect()
    assert len(hooks) == before
