"""The four kinds of edit, each with a small transform, on the architectures where they go wrong first."""

from __future__ import annotations

import copy
import itertools

import models
import pytest
import torch
import transformers as hf
from checks.state import assert_same, gradients, logits, snapshot, train
from checks.transforms import (
    CountCalls,
    HalfTable,
    OtherLinear,
    OwnLinear,
    OwnLinearMixin,
    SwapTokens,
    Tape,
    TapeRunner,
)
from torch import nn

import tightfit
from tightfit.core import hfmodel
from tightfit.core.edits import CallEdit, ModuleEdit, ParameterEdit, StackEdit
from tightfit.core.stack import StackMixin
from tightfit.core.tight import is_tight, state_of
from tightfit.core.transform import Slot


def gemma3():
    """Its loop gives each block its own mask and rotary embedding."""
    config = hf.Gemma3TextConfig(
        **models.SIZE,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=models.VOCABULARY,
        max_position_embeddings=64,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    )
    return models._seeded(lambda: hf.Gemma3ForCausalLM(config), None)


def build(family):
    return gemma3() if family == "gemma3" else models.build(family)


STACKED = ["llama", "gpt2", "bert", "t5", "gemma3", "bart"]


# -- order ------------------------------------------------------------------------------------------------------------

FOUR = (HalfTable(), OwnLinear(), Tape(), SwapTokens())


def _three_steps(recipe):
    model = models.build("llama")
    torch.manual_seed(0)
    applied = tightfit.apply(model, recipe)
    torch.manual_seed(1)
    train(model, applied.optimizer(lr=1e-2), models.batch(model), 3)
    return model.state_dict()


@pytest.mark.parametrize(
    "four",
    [FOUR, pytest.param((*FOUR[:3], tightfit.Lora(rank=2)), marks=pytest.mark.slow)],
    ids=["one-of-each-kind", "with-lora"],
)
def test_all_orders_give_the_same_bits(four):
    first = _three_steps(tightfit.chain(*four))
    for order in itertools.permutations(four):
        found = _three_steps(tightfit.chain(*order))
        assert list(found) == list(first)
        assert all(torch.equal(found[key], value) for key, value in first.items()), order


# -- parameter edit ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "llama", "llama-tied", "gpt2", "t5"])
def test_a_parameter_edit_keeps_state_dicts_stock(family):
    model = models.build(family)
    stock = {key: value.clone() for key, value in model.state_dict().items()}
    table = model.get_input_embeddings()
    applied = tightfit.apply(model, HalfTable())
    assert table.weight.dtype == torch.bfloat16
    state = model.state_dict()
    assert list(state) == list(stock)
    assert all(torch.equal(state[key], value) for key, value in stock.items())
    tied = {alias.name for alias in hfmodel.aliases(model, table.weight)}
    other = {key: value + 1 if key in tied else value for key, value in stock.items()}
    given = dict(other)
    model.load_state_dict(given)
    assert all(given[key] is other[key] for key in given)  # the caller's dict is as it was
    assert all(torch.equal(model.state_dict()[key], value) for key, value in other.items())
    applied.remove()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in other.items())


def test_tied_aliases_share_the_stand_in_and_the_expanded_tensor():
    model = models.build("t5")
    tightfit.apply(model, HalfTable())
    small = {id(alias_owner.weight) for alias_owner in (model.shared, model.encoder.embed_tokens, model.lm_head)}
    assert len(small) == 1
    state = model.state_dict()
    assert (
        len({state[key].data_ptr() for key in ("shared.weight", "encoder.embed_tokens.weight", "lm_head.weight")}) == 1
    )
    model.tie_weights()
    assert model.lm_head.weight is model.shared.weight


def test_the_stock_memory_is_released():
    model = models.build("bert")
    original = model.get_input_embeddings().weight
    tightfit.apply(model, HalfTable())
    assert original.numel() == 0


def test_a_model_without_values_is_refused_but_can_be_planned():
    model = tightfit.skeleton(models.build("bert").config)
    before = {name: id(p) for name, p in model.named_parameters()}
    with pytest.raises(tightfit.StateError, match=r"embeddings.weight is on the meta device.*plan\(\) works"):
        tightfit.apply(model, HalfTable())
    assert {name: id(p) for name, p in model.named_parameters()} == before


# -- module edit ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "t5"])
def test_a_module_edit_runs_its_own_backward(family, monkeypatch):
    from checks import transforms

    calls = []
    stock_backward = transforms._OwnLinear.backward
    monkeypatch.setattr(
        transforms._OwnLinear, "backward", staticmethod(lambda ctx, g: calls.append(1) or stock_backward(ctx, g))
    )
    model = models.build(family)
    names = hfmodel.block_linears(model)
    tightfit.apply(model, OwnLinear())
    gradients(model, models.batch(model))
    assert len(calls) == len(names)


def test_a_module_edit_under_adapters_sits_on_the_stock_layer():
    model = models.build("llama")
    with tightfit.apply(model, [tightfit.Lora(rank=2), OwnLinear()]):
        layer = model.model.layers[0].mlp.down_proj
        assert not is_tight(layer)
        assert is_tight(layer.base_layer, OwnLinearMixin)
        assert not any(is_tight(m) for m in layer.lora_A.values())
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear


def test_two_module_edits_share_a_layer():
    model = models.build("bert")
    wanted = gradients(models.build("bert"), models.batch(model))
    applied = tightfit.apply(model, [OwnLinear(), OtherLinear()])
    found = gradients(model, models.batch(model))
    torch.testing.assert_close(found, wanted)
    query = model.bert.encoder.layer[0].attention.self.query
    assert [m.__name__ for m in type(query).__mro__[1:3]] == ["OwnLinearMixin", "OtherLinearMixin"]
    applied.remove()
    assert type(query) is nn.Linear


def test_an_edit_outlives_a_merged_adapter_layer():
    import peft

    model = models.build("bert")
    applied = tightfit.apply(model, OwnLinear(where="query"))
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query"]))
    assert wrapped.merge_and_unload() is model
    assert is_tight(model.bert.encoder.layer[0].attention.self.query, OwnLinearMixin)
    applied.remove()
    assert type(model.bert.encoder.layer[0].attention.self.query) is nn.Linear


# -- stack edit -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", STACKED)
def test_a_stack_edit_is_exact(family):
    stock, model = build(family), build(family)
    batch = models.batch(stock)
    applied = tightfit.apply(model, Tape())
    loss, grads = gradients(model, batch)
    stock_loss, stock_grads = gradients(stock, batch)
    assert torch.equal(loss, stock_loss)
    assert set(grads) == set(stock_grads)
    for name, gradient in stock_grads.items():
        torch.testing.assert_close(grads[name], gradient, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
    assert torch.equal(logits(model, batch), logits(stock, batch))
    applied.remove()
    assert not any(is_tight(m) for m in model.modules())


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "gemma3"])
def test_the_kv_cache_is_dropped_in_training_and_kept_for_generation(family):
    model = build(family)
    assert model.config.use_cache
    batch = models.batch(model)
    wanted = model.eval().generate(batch["input_ids"][:1], max_new_tokens=4, do_sample=False)
    tightfit.apply(model, Tape())
    assert torch.equal(model.generate(batch["input_ids"][:1], max_new_tokens=4, do_sample=False), wanted)
    model.train()
    cache = model(**batch).past_key_values
    assert cache is None or cache.get_seq_length() == 0


def test_a_second_run_with_a_cache_is_an_error_not_a_wrong_gradient():
    model = models.build("llama").eval()
    tightfit.apply(model, Tape())
    loss = model(**models.batch(model)).loss
    with pytest.raises(tightfit.StateError, match=r"would run again.*use_cache=False"):
        loss.backward()
    model(**models.batch(model), use_cache=False).loss.backward()


def test_a_filled_cache_is_refused_in_training():
    model = models.build("llama")
    batch = models.batch(model)
    with torch.no_grad():
        cache = model(batch["input_ids"]).past_key_values
    tightfit.apply(model, Tape())
    with pytest.raises(tightfit.StateError, match="filled DynamicCache"):
        model(input_ids=batch["input_ids"], past_key_values=cache)


def _runner(model):
    return state_of(next(m for m in model.modules() if is_tight(m, StackMixin)), StackMixin)["stack"]


def test_a_tape_is_opened_for_each_forward():
    model, stock = models.build("llama"), models.build("llama")
    tightfit.apply(model, Tape())
    batches = [models.batch(model, seed=seed) for seed in (1, 2)]

    def two_forwards_one_backward(m):
        m.zero_grad()
        losses = [m(**b).loss for b in batches]
        with torch.no_grad():
            m(**batches[0])
        sum(losses).backward()
        return [p.grad for p in m.parameters()]

    for a, b in zip(two_forwards_one_backward(model), two_forwards_one_backward(stock)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    stack = _runner(model)
    assert stack.tape is None
    assert stack.runner.tapes[:3] == [[0, 1]] * 3


def test_an_exception_in_a_forward_leaves_no_tape():
    model = models.build("llama")
    tightfit.apply(model, Tape())

    def fail(*args):
        raise KeyError("in the middle")

    hook = model.model.layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(KeyError):
        model(**models.batch(model))
    assert _runner(model).tape is None
    hook.remove()
    gradients(model, models.batch(model))


def test_the_models_own_checkpointing_is_inert_under_a_stack_edit():
    model = models.build("bert")
    tightfit.apply(model, Tape())
    model.activation_checkpointing_enable()
    assert not model.bert.encoder.layer[0].gradient_checkpointing
    gradients(model, models.batch(model))
    assert _runner(model).runner.tapes == [[0, 1]]


def test_inner_states_are_right_under_a_stack_edit():
    stock, model = models.build("t5").eval(), models.build("t5").eval()
    tightfit.apply(model, Tape())
    batch = models.batch(stock)
    with torch.no_grad():
        wanted = stock(**batch, output_hidden_states=True)
        found = model(**batch, output_hidden_states=True)
    for key in ("encoder_hidden_states", "decoder_hidden_states"):
        assert all(torch.equal(a, b) for a, b in zip(found[key], wanted[key], strict=True))


def test_a_copied_stack_has_its_own_state():
    model = models.build("bert")
    tightfit.apply(model, Tape())
    twin = copy.deepcopy(model)
    gradients(twin, models.batch(twin))
    assert _runner(twin) is not _runner(model)
    assert _runner(model).runner.tapes == []
    assert len({id(state_of(b, StackMixin)["stack"]) for b in twin.bert.encoder.layer}) == 1


def test_shared_blocks_and_skipped_blocks_are_refused():
    albert = hf.AlbertForSequenceClassification(hf.AlbertConfig(**models.SIZE, embedding_size=16, vocab_size=50))
    group = albert.albert.encoder.albert_layer_groups
    group.append(group[0])
    before = snapshot(albert)
    with pytest.raises(tightfit.UnsupportedModelError, match="one shared module"):
        tightfit.apply(albert, Tape())
    assert_same(before, snapshot(albert))
    bart = models.bart(encoder_layerdrop=0.1)
    with pytest.raises(tightfit.UnsupportedModelError, match=r"model.encoder skips .*model.encoder.layerdrop = 0.0"):
        tightfit.apply(bart, Tape())


def test_blocks_called_by_keyword():
    from tightfit.core.tight import tighten

    class Block(nn.Linear):
        def forward(self, hidden_states, scale=1.0):
            return super().forward(hidden_states) * scale

    block = Block(2, 2)
    wanted = block(torch.ones(1, 2), scale=2.0)
    stack = tightfit.core.stack.StackState(TapeRunner(), 1)
    tighten(block, StackMixin, {"stack": stack, "index": 0, "number": 0})
    assert torch.equal(block(hidden_states=torch.ones(1, 2), scale=2.0), wanted)


# -- call edit --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_a_call_edit_on_the_model(family):
    model = models.build(family)
    batch = models.batch(model)
    wanted = logits(model, batch)
    applied = tightfit.apply(model, CountCalls())
    assert torch.equal(logits(model, batch), wanted)
    model(**batch)
    assert applied.report()["methods"] == {"CountCalls": {"calls": 2}}


def test_a_call_edit_on_the_backbone_sees_a_trainer_that_replaces_the_forward():
    """A fused trainer head calls the backbone and never the top model's class forward."""
    model = models.build("llama")
    tightfit.apply(model, SwapTokens(rate=0.99))
    seen = []
    model.model.embed_tokens.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    ids = models.batch(model)["input_ids"]
    model.forward = lambda input_ids: model.lm_head(model.model(input_ids=input_ids).last_hidden_state)
    model(input_ids=ids)
    assert not torch.equal(seen[0], ids)


class Counting:
    """Counts calls of the module."""

    def forward(self, *args, **kwargs):
        state_of(self, Counting)["calls"].append(1)
        return super().forward(*args, **kwargs)


def _opt():
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 64}
    return hf.OPTForCausalLM(hf.OPTConfig(**size, word_embed_proj_dim=32, vocab_size=models.VOCABULARY))


def _bart_decoder():
    config = hf.BartConfig(d_model=32, decoder_layers=2, decoder_attention_heads=2, vocab_size=models.VOCABULARY)
    return hf.BartForCausalLM(config)


@pytest.mark.parametrize("make", [_opt, _bart_decoder, *(lambda f=f: build(f) for f in STACKED)])
def test_a_call_edit_sees_every_call_also_where_a_head_calls_past_the_backbone(make):
    model, calls = make(), []
    edit = CallEdit(mixin=Counting, state=lambda module: {"calls": calls})
    handle = edit.run(model)
    ids = torch.randint(5, 100, (2, 8))
    model(input_ids=ids, **({"labels": ids} if model.config.is_encoder_decoder else {}))
    handle.undo(model)
    assert len(calls) == 1


def test_a_call_edit_names_its_places():
    with pytest.raises(ValueError, match=r"CallEdit\(where=...\): got 'backbnoe'.*did you mean 'backbone'"):
        CallEdit(where="backbnoe", mixin=OwnLinearMixin)


# -- what is listed ---------------------------------------------------------------------------------------------------


def test_edits_describe_themselves():
    model = models.build("bert")
    aliases = tuple(hfmodel.aliases(model, model.bert.embeddings.word_embeddings.weight))
    blocks = tuple(hfmodel.stacks(model)[0])
    assert ParameterEdit(aliases=aliases, codec=None).target == "bert.embeddings.word_embeddings.weight"
    assert ModuleEdit(module="", mixin=object).target == "(model)"
    assert CallEdit(mixin=object).target == "(backbone)"
    edit = StackEdit(blocks=blocks, runner=TapeRunner)
    assert edit.target == "bert.encoder.layer.0..1"
    assert {slot for slot, _ in edit.claims()} == {Slot.BLOCKS, Slot.RECOMPUTE}
