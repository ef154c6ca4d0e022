"""Sherl: the aggregation, the late blocks, exact start, generation, and what is refused."""

import copy
import math

import models
import pytest
import torch
import transformers as hf
from checks.state import assert_same, gradients, logits, snapshot, train
from side_cases import four, made_inside, shaken, side_nets

import tightfit
from tightfit import Lora, Sherl
from tightfit.core.edits import planning
from tightfit.core.memory import saved_bytes
from tightfit.methods.side.sherl import SherlNet, redundancy, weights

FAMILIES = ("bert", "llama", "t5", "bart")


# -- aggregation ------------------------------------------------------------------------------------------------------


def test_equal_taps_share_alike():
    z = torch.randn(2, 3, 1, 8).expand(2, 3, 5, 8)
    torch.testing.assert_close(redundancy(z), torch.full((2, 3, 5), 5.0))
    torch.testing.assert_close(weights(z, torch.full((2, 3, 5), 0.7)), torch.full((2, 3, 5), 0.2))


def test_orthogonal_taps_are_not_redundant():
    z = torch.eye(4).expand(2, 3, 4, 4) * 3
    torch.testing.assert_close(redundancy(z), torch.ones(2, 3, 4))
    opposite = torch.stack([z[..., 0, :], -z[..., 0, :]], dim=-2)
    torch.testing.assert_close(redundancy(opposite), torch.ones(2, 3, 2))


@pytest.mark.parametrize("z", [torch.randn(2, 3, 4, 8), torch.zeros(2, 3, 4, 8)], ids=["random", "zero"])
def test_scores_of_zero_give_shares_of_zero(z):
    z = z.clone().requires_grad_(True)
    share = weights(z, torch.zeros(2, 3, 4))
    assert not share.any()
    share.sum().backward()
    assert torch.isfinite(z.grad).all()


def test_a_score_below_zero_is_none():
    z = torch.eye(3).expand(2, 3, 3)
    torch.testing.assert_close(weights(z, torch.tensor([-5.0, 1.0, 3.0])), torch.tensor([0.0, 0.25, 0.75]).expand(2, 3))


def test_the_published_gate_has_a_temperature():
    net, last = SherlNet((0, 1), 8, 4, start=False, temperature=0.2), torch.randn(1, 2, 8)
    with torch.no_grad():
        net.gate.fill_(0.1)
        for parameter in net.out.parameters():
            parameter.zero_()
    joined = net.joined([net.tapped(index, last) for index in (None, 0, 1)], last)
    torch.testing.assert_close(joined, math.tanh(0.5) * last)


def slow(model, base, ids):
    """Logits by hand, one token and one tap at a time, without padding."""
    net = side_nets(model)[0]
    states = base(ids, output_hidden_states=True, use_cache=False).hidden_states[:4]  # the last block is late
    z = []
    for x, name in zip(states, ("tap_first", "tap_0", "tap_1", "tap_2")):
        tap = getattr(net, name)
        a = torch.relu(x @ tap.down.weight.T + tap.down.bias)
        gate = torch.sigmoid(a @ tap.gate.weight.T + tap.gate.bias)
        z.append((a @ tap.mix.weight.T + tap.mix.bias + a) * gate)
    joined = torch.empty_like(states[0])
    for b in range(ids.shape[0]):
        for t in range(ids.shape[1]):
            own = [v[b, t] for v in z]
            c = []
            for i in range(3):
                near = [torch.relu(torch.cosine_similarity(own[i], own[j], dim=0)) for j in range(3)]
                score = torch.relu((net.score.weight[0] * (own[i] * own[3])).sum() + net.score.bias[0])
                c.append(score / sum(near))
            total = max(float(sum(c)), 1e-6)
            mixed = sum(ci / total * zi for ci, zi in zip(c, own)) + own[3]
            joined[b, t] = net.out.weight @ torch.relu(mixed) + net.out.bias + net.gate * states[3][b, t]
    length = ids.shape[1]
    mask = torch.full((length, length), -torch.inf, dtype=torch.double).triu(1)[None, None]
    tables = base.model.rotary_emb(joined, torch.arange(length)[None])
    late = base.model.layers[3](joined, attention_mask=mask, position_embeddings=tables)
    return base.lm_head(net.norm(late))


def test_the_sum_is_what_the_paper_says():
    base = four("llama").double().eval()
    model = copy.deepcopy(base)
    tightfit.apply(model, Sherl(reduction=4))
    shaken(model)
    with torch.no_grad():
        side_nets(model)[0].norm.weight.mul_(1.5)
        ids = models.batch(model)["input_ids"][:2, :6]
        torch.testing.assert_close(model(ids).logits, slow(model, base, ids))


# -- start, gradients, memory -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("late", [0, 1, 2])
def test_training_starts_at_the_stock_model_and_reaches_every_adapter(family, late):
    model = four(family)
    batch = models.batch(model)
    stock = logits(model, batch)
    keep = ((0, 1, 2), (0, 1)) if late and family in ("t5", "bart") else (0, 1)
    applied = tightfit.apply(model, Sherl(reduction=4, late_layers=late, keep_layers=keep))
    assert torch.equal(logits(model, batch), stock)
    optimizer = applied.optimizer(torch.optim.SGD, lr=0.1)
    for _ in range(3):
        _, found = gradients(model, batch)
        optimizer.step()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(found) == trained
    assert all(found[name].any() for name in trained)
    assert all("tight_side" in name or name.startswith("classifier") for name in trained)


def test_the_published_start_is_not_the_stock_model():
    model = four("llama")
    stock = logits(model, models.batch(model))
    tightfit.apply(model, Sherl(reduction=4, start=False))
    assert not float(side_nets(model)[0].gate.detach())
    assert (logits(model, models.batch(model)) - stock).abs().max() > 0.1


def test_the_published_size():
    sizes = {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12, "d_kv": 64}
    model = tightfit.skeleton(hf.T5Config(**sizes, decoder_start_token_id=0), task="seq2seq-lm")
    kept = (1, 2, 3, 5, 6, 7, 9, 10, 11)
    with planning():
        applied = tightfit.apply(model, Sherl(keep_layers=(kept, kept[:-1]), start=False))
    assert sum(p.numel() for p in applied.parameters()) == 1_907_236


def test_early_blocks_keep_nothing_and_the_late_one_its_inside():
    model = four("llama")
    tightfit.apply(model, Sherl(reduction=4))
    batch = models.batch(model)
    early, kept = made_inside(model, ["model.layers.0", "model.layers.1", "model.layers.2"], batch)
    assert not early & kept
    late, kept = made_inside(model, ["model.layers.3"], batch)
    assert late & kept


def test_more_early_blocks_keep_no_more():
    found = []
    for layers in (5, 9):
        config = hf.BertConfig(**{**models.SIZE, "num_hidden_layers": layers}, vocab_size=120)
        model = hf.BertForSequenceClassification(config).train()
        tightfit.apply(model, Sherl(reduction=8, keep_layers=(0, 2)))
        batch = models.batch(model)
        found.append(saved_bytes(lambda model=model, batch=batch: model(**batch).loss.backward()))
        assert all(p.grad is None for n, p in model.named_parameters() if "side" not in n and "classifier" not in n)
    assert found[0] == found[1]


def test_a_plan_is_a_real_step():
    model = four("llama", dropout=0.0)
    plan = tightfit.plan(model, Sherl(reduction=4), batch=models.batch(model), optimizer="sgd")
    found = plan.verify(model)
    assert found.peak_bytes == plan.peak_bytes
    assert found.saved_bytes == plan.simulation.saved_bytes


# -- use --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "t5", "bart"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_a_cache_is_generation_without(family, beams):
    model = four(family)
    tightfit.apply(model, Sherl(reduction=4))
    shaken(model).eval()
    batch = models.batch(model)
    batch.pop("labels")
    if family == "llama":  # generation pads on the left
        batch = {key: value.flip(1) for key, value in batch.items()}
    options = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False, "pad_token_id": 0}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    cached = model.generate(**batch, **options, use_cache=True)
    again = model.generate(**batch, **options, use_cache=False)
    assert torch.equal(cached.sequences, again.sequences)
    torch.testing.assert_close(torch.stack(cached.scores), torch.stack(again.scores), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_save_load_and_remove(family, tmp_path):
    model = four(family, dropout=0.0)
    batch = models.batch(model)
    model(**batch)  # some models complete their config in the first forward
    before = snapshot(model)
    applied = tightfit.apply(model, Sherl(reduction=4))
    losses = train(model, applied.optimizer(lr=1e-2), batch, 6)
    assert losses[-1] < losses[0]
    applied.save(tmp_path)
    base = four(family, dropout=0.0)
    tightfit.load(base, tmp_path)
    assert torch.equal(logits(base, batch), logits(model, batch))
    twin = copy.deepcopy(model)
    train(twin, torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=0.5), batch, 1)
    assert torch.equal(logits(base, batch), logits(model, batch))
    with pytest.raises(tightfit.StateError, match=r"has no place in a stock"):
        applied.merge()
    applied.remove()
    model.zero_grad()
    trained = {name: value for name, value in before["values"].items() if name.startswith("classifier")}
    for name, value in trained.items():
        model.get_parameter(name).data.copy_(value)
    assert_same(before, snapshot(model))


def test_accumulation_and_autocast():
    model = four("llama", dropout=0.0)
    tightfit.apply(model, Sherl(reduction=4))
    shaken(model, std=0.05)
    one, two = models.batch(model, seed=1), models.batch(model, seed=2)
    (_, first), (_, second), (_, both) = gradients(model, one), gradients(model, two), gradients(model, one, two)
    for name, grad in both.items():
        torch.testing.assert_close(grad, first[name] + second[name], rtol=1e-4, atol=1e-6)
    _, rough = gradients(model, one, autocast=True)
    for name, grad in first.items():
        assert (rough[name] - grad).norm() < 0.15 * grad.norm() + 1e-3, name


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "error", "match"),
    [
        ({"reduction": 0}, ValueError, r"reduction=.*an int >= 1"),
        ({"late_layers": -1}, ValueError, r"late_layers=.*an int >= 0"),
        ({"keep_layers": (2, 1)}, ValueError, r"keep_layers=.*ascending"),
        ({"keep_layers": ((0, 1), (0, 1), (0, 1))}, ValueError, r"keep_layers=.*accepted are indices"),
        ({"keep_layers": ((0, 1), 2)}, TypeError, r"keep_layers=.*tuple of indices"),
        ({"start": 1}, TypeError, r"start=.*True or False"),
        ({"temperature": -1.0}, ValueError, r"temperature="),
    ],
)
def test_fields_out_of_range(fields, error, match):
    with pytest.raises(error, match=match):
        Sherl(**fields)


def test_taps_that_cannot_be_are_refused_and_the_model_left_alone():
    model = four("llama")
    before = snapshot(model)
    for fields, match in (
        ({"reduction": 5}, r"Sherl\(reduction=5\): does not divide hidden_size=32.*1, 2, 4, 8, 16, 32$"),
        ({"keep_layers": (0, 1, 3)}, r"block 3 is a late one.*model\.layers has 4 blocks.*below 3"),
        ({"keep_layers": (0, 9)}, r"block 9 is a late one or beyond.*below 3"),
        ({"keep_layers": (0,)}, r"1 tapped blocks.*at least two"),
        ({"late_layers": 3}, r"1 tapped blocks in model\.layers \(4 blocks\)"),
        ({"late_layers": 4}, r"0 tapped blocks"),
        ({"keep_layers": ((0, 1), (0, 1))}, r"a pair is for an encoder-decoder"),
    ):
        with pytest.raises(ValueError, match=match):
            tightfit.apply(model, Sherl(**fields))
    with pytest.raises(tightfit.ConflictError, match=r"Lora and Sherl"):
        tightfit.apply(model, [Sherl(), Lora()])
    assert_same(before, snapshot(model))


def test_a_late_block_that_is_set_to_train_is_refused():
    model = four("llama")
    tightfit.apply(model, Sherl())
    model.model.layers[3].mlp.up_proj.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"so layers\.3\.mlp\.up_proj\.weight would never"):
        model(**models.batch(model))
