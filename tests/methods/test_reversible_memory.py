"""Reversible: what is kept, and how it begins and ends."""

import copy
import warnings

import models
import pytest
import torch
import torch.nn.functional as F
from checks.real import assert_planned_as_real
from checks.state import gradients, logits
from reversible_cases import close, deep, each_family

import tightfit
from tightfit import Checkpointing, FusedOps, Lora, Mesa, Reversible
from tightfit.core.errors import StateError
from tightfit.core.memory import live_bytes, saved_bytes
from tightfit.core.simulate import simulate
from tightfit.methods.reversible import Coupling
from tightfit.ops.replay import Replay

STATE_BYTES = 8 << 10

# -- what is kept -----------------------------------------------------------------------------------------------------


def kept(recipe, blocks, look=live_bytes):
    """(bytes that hooks see, bytes that are alive after the forward) of a model of so many blocks."""
    model = deep("llama", blocks)
    if recipe is not None:
        tightfit.apply(model, recipe)
    batch = models.batch(model, size=8, length=32)
    hooked = saved_bytes(lambda: model(**batch).loss.backward())
    model.zero_grad()
    before = look()
    loss = model(**batch).loss
    alive = look() - before
    loss.backward()
    return hooked, alive


def hooked(recipe, blocks):
    return kept(recipe, blocks, look=lambda: 0)[0]


@pytest.mark.slow
def test_kept_bytes_grow_by_half_a_byte_an_element():
    elements = 8 * 32 * 32
    found = [kept(Reversible(), blocks) for blocks in (4, 8, 16, 32)]
    for (hooked, alive), (more_hooked, more_alive), blocks in zip(found, found[1:], (4, 8, 16)):
        assert (more_hooked - hooked) / blocks == elements / 2
        # tensors that no hook sees: the random state of each block, and numbers of a few bytes
        assert 0 <= (more_alive - alive) / blocks - elements / 2 <= STATE_BYTES


@pytest.mark.parametrize(
    ("recipe", "bits"),
    [
        (Reversible(), 4),
        (Reversible(variant="meft3", k=2), 4),
        *(
            pytest.param(recipe, bits, marks=pytest.mark.slow)
            for recipe, bits in (
                (Reversible(k=1), 1),
                (Reversible(k=7), 7),
                (Reversible(variant="meft1", k=3), 3),
                (Reversible(exact=False, variant="meft1", allow_inexact=True), 0),
            )
        ),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Reversible.allow_inexact:UserWarning")
def test_kept_bytes_grow_by_k_bits_an_element(recipe, bits):
    assert (hooked(recipe, 8) - hooked(recipe, 4)) / 4 == bits * 8 * 32 * 32 / 8


def test_random_states_are_kept_where_numbers_are_drawn(monkeypatch):
    replays, settle = [], Replay.settle

    def record(self, draws, real):
        settle(self, draws, real)
        replays.append(len(self.random))

    monkeypatch.setattr(Replay, "settle", record)
    for dropout, states in ((0.0, [0] * 4), (0.1, [1] * 4)):
        model = deep("bert", 4, dropout=dropout)
        tightfit.apply(model, Reversible())
        gradients(model, models.batch(model))
        assert replays == states
        replays.clear()
    # what no setting tells of is seen when it happens
    model = deep("bert", 4, dropout=0.0)
    block = model.bert.encoder.layer[2]
    block.output.dense.register_forward_hook(lambda m, args, out: out + 0.1 * torch.randn_like(out))
    tightfit.apply(model, Reversible())
    gradients(model, models.batch(model))
    assert replays == [0, 0, 1, 0]


@pytest.mark.slow
def test_plain_and_checkpointed_blocks_keep_more():
    slope = {}
    for name, recipe in (("stock", None), ("checkpointing", Checkpointing()), ("reversible", Reversible())):
        slope[name] = (hooked(recipe, 6) - hooked(recipe, 4)) / 2
    assert slope["checkpointing"] == 8 * slope["reversible"] == 8 * 32 * 32 * 4
    assert slope["stock"] > 8 * slope["checkpointing"]


PLANNED = [
    [Reversible()],
    [Lora(rank=2), Reversible()],
    [Lora(rank=2), FusedOps(), Reversible()],
    [Mesa(attention=True), Reversible()],
    [Reversible(variant="meft2", adapter_dim=4, merge="concat")],
]


@pytest.mark.parametrize(
    ("family", "recipe"),
    [
        ("llama", PLANNED[0]),
        *(pytest.param(f, recipe, marks=pytest.mark.slow) for f in ("llama", "bert", "t5") for recipe in PLANNED),
    ],
    ids=str,
)
def test_planned_bytes_are_real_bytes(family, recipe):
    model = models.build(family)
    assert_planned_as_real(model, tightfit.apply(model, recipe), models.batch(model, size=4, length=16))


@pytest.mark.slow
def test_operators_inside_keep_less_while_a_block_runs_again():
    def peak(*recipe):
        model = models.build("llama")
        tightfit.apply(model, [Lora(rank=2), *recipe, Reversible()])
        batch = models.batch(model, size=8, length=32)
        return simulate(model, batch, optimizer="sgd").phases["backward"]

    assert peak(FusedOps(loss=False)) < peak()


# -- how it begins and ends -------------------------------------------------------------------------------------------


@each_family
def test_a_small_factor_is_the_stock_model(family):
    model = models.build(family)
    batch = models.batch(model)
    wanted = logits(model, batch)
    tightfit.apply(model, Reversible(k=12))
    found = logits(model, batch)
    assert (found - wanted).abs().max() <= 1e-2 * wanted.abs().max()


def test_two_steps_begin_nearer_to_the_stock_model():
    def far(**fields):
        model = deep("llama", 12)
        batch = models.batch(model)
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.data.normal_(std=0.15)
        wanted = logits(model, batch).log_softmax(-1)
        tightfit.apply(model, Reversible(**fields))
        return F.kl_div(logits(model, batch).log_softmax(-1), wanted, log_target=True, reduction="batchmean")

    assert far(k=4) < far(variant="meft1", exact=False, lam=0.1, adapter_dim=4, allow_inexact=True, anchors=1)


@each_family
def test_after_the_annealing_it_is_the_stock_model_bit_by_bit(family):
    model = models.build(family)
    batch = models.batch(model)
    wanted, stock = logits(model, batch), gradients(copy.deepcopy(model), batch)
    applied = tightfit.apply(model, [Lora(rank=2, config=None), Reversible(anneal=0.5)])
    assert not torch.equal(logits(model, batch), wanted)
    applied.part(Coupling).set_progress(1.0)
    assert torch.equal(logits(model, batch), wanted)
    full = models.build(family)
    tightfit.apply(full, Reversible(anneal=0.5)).part(Coupling).set_progress(1.0)
    loss, grads = gradients(full, batch)
    assert torch.equal(loss, stock[0])
    close(grads, stock[1], 1e-6)


def test_the_factor_falls_in_the_last_part_of_the_training():
    applied = tightfit.apply(models.build("llama"), Reversible(k=9, anneal=0.4))
    part, seen = applied.part(Coupling), []
    for progress in (0.0, 0.59, 0.61, 0.71, 0.81, 0.91, 1.0):
        part.set_progress(progress)
        seen.append(part.report()["factors"][0])
    assert seen == [2**-9, 2**-9, 2**-10, 2**-11, 2**-12, 0.0, 0.0]
    with pytest.raises(ValueError, match=r"got 1.5, accepted is a share in \[0, 1\]"):
        part.set_progress(1.5)


def test_a_trainer_anneals(tmp_path):
    from checks.test_battery import _trainer_run

    model = models.build("bert")
    applied = tightfit.apply(model, Reversible(anneal=0.5))
    _trainer_run(model, [applied.callback()], tmp_path)
    assert applied.part(Coupling).plan.now() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        applied.merge()


def test_annealed_training_in_every_stage():
    model = deep("llama", 3)
    applied = tightfit.apply(model, Reversible(k=11, anneal=0.9))
    part, batch = applied.part(Coupling), models.batch(model)
    for progress in (0.0, 0.5, 0.9):
        part.set_progress(progress)
        assert all(torch.isfinite(g).all() for g in gradients(model, batch)[1].values())


def test_leaving_says_what_is_left_behind(tmp_path):
    applied = tightfit.apply(models.build("bert"), Reversible())
    with pytest.warns(
        UserWarning, match=r"export\(\): the weights were trained with a second stream \(factor 0.0625\)"
    ):
        applied.export(tmp_path / "stock")
    for fields in ({"adapter_dim": 2}, {"merge": "concat"}):
        applied = tightfit.apply(models.build("bert"), Reversible(**fields))
        with pytest.raises(
            StateError, match=r"merge\(\): .* has no place in a stock BertForSequenceClassification; save"
        ):
            applied.merge()
        applied.remove()
