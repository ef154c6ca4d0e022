"""apply: all or nothing, conflicts, states, optimizers."""

from __future__ import annotations

import copy
import gc

import models
import pytest
import torch
from checks.state import assert_same, gradients, snapshot, train
from checks.transforms import CountCalls, Fails, HalfTable, OtherLinear, OtherTape, OwnLinear, Tape
from torch import nn

import tightfit
from tightfit import Checkpointing, Lora, PartialEmbedding, RecurrentMemory, chain


def everything(model):
    return [
        PartialEmbedding(ids=models.kept_ids(model), force=True),
        OwnLinear(),
        Lora(rank=2),
        Checkpointing(offload=True),
        CountCalls(),
    ]


# -- all or nothing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_an_edit_that_fails_leaves_the_model_as_it_was(family):
    model = models.build(family)
    gradients(model, models.batch(model))
    held = {name: p.grad for name, p in model.named_parameters()}
    before = snapshot(model)
    for recipe in (everything(model)[:4], [HalfTable(), Tape(), Lora(rank=2)]):
        with pytest.raises(ZeroDivisionError, match="half-way"):
            tightfit.apply(model, [*recipe, Fails()])
        assert_same(before, snapshot(model))
    assert {name: p.grad for name, p in model.named_parameters()} == held
    tightfit.apply(model, everything(model)).remove()


def test_an_adapter_that_fails_half_way_is_taken_back(monkeypatch):
    import peft

    stock = peft.tuners.lora.model.LoraModel._create_and_replace
    calls = []

    def fail_later(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("out of adapters")
        return stock(self, *args, **kwargs)

    model = models.build("bert")
    before = snapshot(model)
    monkeypatch.setattr(peft.tuners.lora.model.LoraModel, "_create_and_replace", fail_later)
    with pytest.raises(RuntimeError, match="out of adapters"):
        tightfit.apply(model, [HalfTable(), Lora(rank=2)])
    assert_same(before, snapshot(model))


def test_a_mixin_that_cannot_go_everywhere_goes_nowhere():
    model = models.build("llama")
    last = model.model.layers[1]
    last.forward = last.forward
    before = snapshot(model)
    with pytest.raises(tightfit.StateError, match="`forward` is set on the instance"):
        tightfit.apply(model, Tape())
    assert_same(before, snapshot(model))


# -- conflicts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (
            [Tape(), OtherTape()],
            r"OtherTape and Tape both take over bert.encoder.layer.0, bert.encoder.layer.1 \(slot 'blocks'\)",
        ),
        (
            [Tape(), Checkpointing()],
            r"Checkpointing and Tape both take over bert.encoder.layer.0.*\(slot 'recompute'\)",
        ),
        ([Lora(), Lora(rank=2)], r"Lora appears twice in the recipe; keep one"),
        (
            [OwnLinear(alone=True), OtherLinear()],
            r"OtherLinear and OwnLinear both take over .*query.* and 9 more \(slot 'operators'\)",
        ),
        ([OwnLinear(alone=True), OtherLinear(alone=True)], r"OtherLinear and OwnLinear both take over"),
        (
            [HalfTable(), PartialEmbedding(ids=range(119), force=True)],
            r"HalfTable and PartialEmbedding both take over .*word_emb",
        ),
    ],
)
def test_conflicts_name_methods_place_and_slot(recipe, said):
    model = models.build("bert")
    before = snapshot(model)
    if isinstance(recipe[-1], PartialEmbedding):
        recipe = [recipe[0], PartialEmbedding(ids=models.kept_ids(model), force=True)]
    with pytest.raises(tightfit.ConflictError, match=said):
        tightfit.apply(model, recipe)
    with pytest.raises(tightfit.ConflictError, match=said):
        tightfit.apply(model, recipe[::-1])
    assert_same(before, snapshot(model))
    plan = tightfit.plan(model, recipe, batch=(2, 8))
    assert plan.conflicts
    assert "cannot be applied" in str(plan)


def test_the_one_that_takes_a_shared_place_is_named():
    from tightfit.core.conflicts import find_conflicts
    from tightfit.core.edits import ModuleEdit

    planned = [
        (CountCalls(), ModuleEdit(module="a", mixin=object)),
        (OtherLinear(), ModuleEdit(module="a", mixin=object)),
        (OwnLinear(), ModuleEdit(module="a", mixin=object, exclusive=True)),
    ]
    assert {(c.first, c.second) for c in find_conflicts(planned)} == {
        ("CountCalls", "OwnLinear"),
        ("OtherLinear", "OwnLinear"),
    }


def test_transforms_that_share_a_place_do_not_conflict():
    tightfit.apply(models.build("bert"), [OwnLinear(), OtherLinear()])


# -- states -----------------------------------------------------------------------------------------------------------


def test_applying_twice():
    model = models.build("bert")
    first = tightfit.apply(model, Lora(rank=2))
    with pytest.raises(tightfit.StateError, match=r"already carries the recipe Lora; call its .remove\(\)"):
        tightfit.apply(model, Checkpointing())
    first.remove()
    tightfit.apply(model, Checkpointing())


def test_a_copy_of_an_applied_model_is_refused():
    model = models.build("bert")
    _applied = tightfit.apply(model, OwnLinear())
    with pytest.raises(tightfit.StateError, match=r"is a copy of, or holds, a model with a recipe applied \(at bert"):
        tightfit.apply(copy.deepcopy(model), Checkpointing())


def test_not_a_model():
    with pytest.raises(TypeError, match=r"apply\(model, ...\): got str"):
        tightfit.apply("bert", Lora())


def test_use_after_leaving(tmp_path):
    model = models.build("bert")
    applied = tightfit.apply(model, Lora(rank=2))
    applied.merge()
    for use in (
        applied.remove,
        applied.merge,
        applied.parameters,
        applied.optimizer,
        applied.callback,
        applied.report,
        applied.stock_state_dict,
        lambda: applied.save(tmp_path / "a"),
        lambda: applied.export(tmp_path / "b"),
    ):
        with pytest.raises(tightfit.StateError, match=r"taken off already \(merge\(\) was called\)"):
            use()
    assert not list(tmp_path.iterdir())
    assert "merged" in repr(applied)


def test_a_context_removes_unless_it_was_left_before():
    model = models.build("bert")
    before = snapshot(model)
    with pytest.raises(KeyError), tightfit.apply(model, everything(model)):
        raise KeyError
    assert_same(before, snapshot(model))
    with tightfit.apply(model, Lora(rank=2)) as applied:
        applied.merge()


def test_a_failed_remove_can_be_repeated():
    model = models.build("bert")
    before = snapshot(model)
    applied = tightfit.apply(model, [OwnLinear(where="query"), CountCalls()])
    layer = model.bert.encoder.layer[0].attention.self.query
    worn, layer.__class__ = type(layer), nn.Identity
    with pytest.raises(tightfit.StateError, match="replaced after"):
        applied.remove()
    layer.__class__ = worn
    applied.remove()
    assert_same(before, snapshot(model))


@pytest.fixture
def group():
    import tempfile

    with tempfile.NamedTemporaryFile() as file:
        torch.distributed.init_process_group("gloo", init_method=f"file://{file.name}", rank=0, world_size=1)
        yield
        torch.distributed.destroy_process_group()


def test_wrapped_models_are_refused(group):
    from torch.distributed.fsdp import fully_shard

    model = models.build("bert")
    with pytest.raises(tightfit.StateError, match=r"wrapped in DistributedDataParallel; apply the recipe before"):
        tightfit.apply(nn.parallel.DistributedDataParallel(model), Lora())
    with pytest.raises(tightfit.StateError, match="is compiled"):
        tightfit.apply(torch.compile(model, backend="eager"), Lora())
    fully_shard(model)
    with pytest.raises(tightfit.StateError, match=r"word_embeddings.weight is sharded \(DTensor\)"):
        tightfit.apply(model, Lora())


@pytest.mark.parametrize(
    "recipe", [[OwnLinear(), Tape()], [PartialEmbedding(ids=range(120), force=True)]], ids=["edits", "table"]
)
def test_sharding_after_apply(recipe, group):
    """fully_shard puts its own class on top of ours; taking ours off rebuilds it over the stock class."""
    from torch.distributed.fsdp import FSDPModule, fully_shard

    stock, model = models.build("llama"), models.build("llama")
    batch = models.batch(model)
    wanted = train(stock, torch.optim.SGD(stock.parameters(), lr=0.1), batch, 2)
    applied = tightfit.apply(model, recipe)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    assert type(model.model.layers[0]).__name__ == "FSDPLlamaDecoderLayer"
    optimizer = applied.optimizer(torch.optim.SGD, lr=0.1)
    torch.testing.assert_close(train(model, optimizer, batch, 2), wanted, rtol=1e-5, atol=1e-6)
    if isinstance(recipe[0], PartialEmbedding):
        assert model.state_dict()["model.embed_tokens.weight"].shape == (models.VOCABULARY, 32)
        with pytest.raises(tightfit.StateError, match=r"remove\(\): model.embed_tokens.weight has been sharded"):
            applied.remove()
        return
    applied.remove()
    layer = model.model.layers[0]
    assert isinstance(layer, FSDPModule)
    assert type(layer).__name__ == "FSDPLlamaDecoderLayer"
    assert type(layer).__mro__[2] is type(stock.model.layers[0])
    assert type(layer.mlp.down_proj) is nn.Linear
    with pytest.raises(AssertionError, match="does not support deepcopy"):
        copy.deepcopy(layer)
    torch.testing.assert_close(
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), batch, 1),
        train(stock, torch.optim.SGD(stock.parameters(), lr=0.1), batch, 1),
        rtol=1e-5,
        atol=1e-6,
    )


# -- optimizers -------------------------------------------------------------------------------------------------------


def partial(model):
    return PartialEmbedding(ids=models.kept_ids(model), force=True)


def test_a_stale_optimizer_is_stopped_and_can_be_adopted():
    model = models.build("bert")
    early = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, early, models.batch(model), 1)
    moments = early.state[model.get_input_embeddings().weight]["exp_avg"].clone()
    applied = tightfit.apply(model, partial(model))
    with pytest.raises(tightfit.StateError, match=r"group 0 holds a parameter that the recipe.*adopt\(optimizer\)"):
        train(model, early, models.batch(model), 1)
    assert applied.adopt(early) is early
    table = model.get_input_embeddings().weight
    assert torch.equal(early.state[table]["exp_avg"], moments[list(models.kept_ids(model))])
    train(model, early, models.batch(model), 1)
    applied.remove()
    with pytest.raises(tightfit.StateError, match=r"which remove\(\) took off.*build a new optimizer"):
        train(model, early, models.batch(model), 1)


@pytest.mark.parametrize("recipe", [Lora(rank=2), RecurrentMemory(tokens=2, segment=4)], ids=str)
def test_an_optimizer_made_before_what_the_recipe_adds_is_stopped(recipe):
    model = models.build("llama")
    early = torch.optim.AdamW(model.parameters(), lr=1e-3)
    applied = tightfit.apply(model, recipe)
    with pytest.raises(
        tightfit.StateError, match=r"AdamW: it was made without the parameters that the recipe .* added"
    ):
        train(model, early, models.batch(model), 2)
    train(model, applied.optimizer(lr=1e-3), models.batch(model), 1)
    train(model, early, models.batch(model), 2)  # another one has the others


def test_an_optimizer_of_the_head_alone_is_left_alone():
    model = models.build("bert")
    _applied = tightfit.apply(model, Lora(rank=2))
    train(model, torch.optim.SGD(model.classifier.parameters(), lr=0.1), models.batch(model), 2)


def test_other_optimizers_are_left_alone():
    model, other = models.build("bert"), nn.Linear(2, 2)
    _applied = tightfit.apply(model, partial(model))
    other(torch.ones(1, 2)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()


def test_an_applied_that_is_dropped_leaves_no_hook():
    from torch.optim.optimizer import _global_optimizer_pre_hooks

    gc.collect()
    count = len(_global_optimizer_pre_hooks)
    applied = tightfit.apply(models.build("bert"), Checkpointing())
    assert len(_global_optimizer_pre_hooks) == count + 1
    del applied
    gc.collect()
    assert len(_global_optimizer_pre_hooks) == count


def test_nothing_to_train():
    model = models.build("bert").requires_grad_(False)
    applied = tightfit.apply(model, Checkpointing())
    with pytest.raises(tightfit.StateError, match="leaves no parameter to train"):
        applied.optimizer()


def test_report_and_part():
    from checks.transforms import Counter

    model = models.build("bert")
    applied = tightfit.apply(model, [Lora(rank=2), CountCalls()])
    report = applied.report()
    assert report["recipe"] == "Lora + CountCalls"
    assert report["trainable_parameters"] == sum(p.numel() for p in applied.parameters())
    assert applied.part(Counter) is applied.parts[0]
    with pytest.raises(tightfit.StateError, match=r"has no Vocabulary"):
        PartialEmbedding.of(applied)
    assert applied.recipe == chain(Lora(rank=2), CountCalls())
    assert tightfit.apply(models.build("bert"), None).report()["recipe"] == "stock"
