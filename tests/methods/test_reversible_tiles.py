"""Reversible: behind the attention a block's tokens go on in tiles, with the same streams and gradients."""

import copy

import models
import pytest
import torch
import transformers as hf
from checks.state import gradients
from reversible_cases import close, deep, later, recorded_streams

import tightfit
from tightfit import FusedOps, Lora, Mesa, Reversible, WtaCrs
from tightfit.core.errors import StateError
from tightfit.methods.reversible import tiles
from tightfit.methods.reversible.seam import cut_of

WIDE = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 2, "vocab_size": models.VOCABULARY}


@pytest.fixture
def tiled(monkeypatch):
    """The tiles of each backward; they may be of four tokens."""
    monkeypatch.setattr(tiles, "LEAST", 4)
    found, real = [], tiles.Tiled.backward

    def backward(self, *arguments):
        found.append(self.count)
        return real(self, *arguments)

    monkeypatch.setattr(tiles.Tiled, "backward", backward)
    return found


@pytest.fixture
def recorded(monkeypatch):
    return recorded_streams(monkeypatch)


def adapted(model, *recipe, tiles=4, rank=1, **fields):
    """The model under Lora, whose adapters do something, and Reversible."""
    torch.manual_seed(7)
    applied = tightfit.apply(model, [Lora(rank=rank), *recipe, Reversible(tiles=tiles, **fields)])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    return applied.model


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2", "gemma2", *later("roberta", "vit")])
@pytest.mark.parametrize("recipe", [(), (FusedOps(),)])
def test_gradients_are_those_of_whole_blocks(family, recipe, tiled):
    model = models.build(family, dropout=0.0).double()
    batch = models.batch(model, size=4)
    batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    wanted = gradients(adapted(copy.deepcopy(model), *recipe, tiles=1, bits=22), batch)
    assert not tiled
    found = gradients(adapted(model, *recipe, tiles=3, bits=22), batch)
    assert tiled == [3, 3]
    assert abs(found[0] - wanted[0]) < 1e-6
    close(found[1], wanted[1], 1e-5)


@pytest.mark.parametrize(("family", "autocast"), [("llama", True), ("bert", False), ("gpt2", True)])
@pytest.mark.parametrize("recipe", [(), (FusedOps(), Mesa(rounding="stochastic"))])
def test_streams_come_back_bit_by_bit(family, autocast, recipe, tiled, recorded):
    gone, back = recorded
    model = deep(family, 8, dropout=0.1)
    batch = models.batch(model, size=4)
    adapted(model, *recipe)
    _, grads = gradients(model, batch, autocast=autocast)
    assert tiled == [4] * 8 and len(gone) == 8 and len(back) == 7
    assert all(torch.equal(a, b) for a, b in zip(reversed(gone), back))
    assert all(bool(grad.any()) for name, grad in grads.items() if "lora_A" in name)


def test_forwards_before_a_backward_and_copies(tiled):
    model = models.build("llama", dropout=0.1)
    one, two = (models.batch(model, size=4, seed=seed) for seed in (1, 2))
    model = adapted(model)
    _, apart = gradients(model, one, two)
    torch.manual_seed(0)
    model.zero_grad()
    losses = [model(**batch).loss for batch in (one, two)]
    sum(losses).backward()
    assert len(tiled) == 8
    close({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, apart, 1e-6)
    close(gradients(copy.deepcopy(model), one, two)[1], apart, 1e-7)


class Permuted(torch.nn.Embedding):
    """An embedding in half precision, whose output lies in memory with its rows across."""

    def forward(self, ids):
        return super().forward(ids).bfloat16().transpose(0, 1).contiguous().transpose(0, 1)


def test_states_of_another_layout_and_type(tiled, recorded):
    gone, back = recorded
    model = adapted(models.build("llama", dropout=0.0), bits=20)
    table = model.get_input_embeddings()
    table.__class__ = Permuted
    table.weight.requires_grad_(True)  # so that the lowest block gives its input back as well
    gradients(model, models.batch(model, size=4))
    assert tiled == [4, 4] and len(back) == 2
    assert all(torch.equal(a, b) for a, b in zip(reversed(gone), back))


def test_meft_with_adapters(tiled):
    model = models.build("bert", dropout=0.0).double()
    batch = models.batch(model, size=4)

    def found(tiles):
        torch.manual_seed(3)
        part = Reversible(variant="meft1", adapter_dim=2, bits=22, tiles=tiles)
        return gradients(tightfit.apply(copy.deepcopy(model), part).model, batch)[1]

    close(found(4), found(1), 1e-5)
    assert tiled == [4, 4]


def step(model, *recipe, **options):
    batch = models.batch(model, size=4)
    adapted(model, *recipe, **options)(**batch).loss.backward()


def test_blocks_that_run_whole(tiled):
    model = models.build("llama")
    step(model, rank=64)  # more numbers train in a block than its states have
    step(models.build("llama"), WtaCrs())  # rows of the whole are chosen
    step(hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**WIDE, num_hidden_layers=1)).train())
    step(hf.Olmo2ForCausalLM(hf.Olmo2Config(**WIDE, num_hidden_layers=1, pad_token_id=0)).train())
    bloom = hf.BloomConfig(hidden_size=32, n_layer=1, n_head=2, vocab_size=models.VOCABULARY)
    step(hf.BloomForCausalLM(bloom).train())
    step(models.build("t5"))
    experts = hf.MixtralConfig(**WIDE, num_hidden_layers=1, num_key_value_heads=2, num_local_experts=2)
    step(hf.MixtralForCausalLM(experts).train())
    watched = adapted(models.build("llama"))
    seen = []
    watched.get_submodule("model.layers.0.mlp").register_forward_hook(lambda m, a, out: seen.append(out.shape))
    batch = models.batch(watched, size=4)
    watched(**batch).loss.backward()
    assert tiled == [4]  # the other block
    assert seen == [torch.Size((4, 9, 32))] * 2


class Mixing(torch.nn.Module):
    """An MLP's activation that sees the token before, as a convolution does."""

    def forward(self, x):
        return torch.nn.functional.silu(x + x.roll(1, dims=1))


def test_what_mixes_tokens_behind_the_attention_runs_whole(tiled):
    model = models.build("llama")
    model.model.layers[0].mlp.act_fn = Mixing()
    step(model)
    assert tiled == [4]  # the other block


def test_an_evaluation_runs_whole_blocks(tiled, monkeypatch):
    model = adapted(models.build("llama"))
    batch = models.batch(model, size=4)
    monkeypatch.setattr(tiles.Tiled, "__call__", None)
    with torch.no_grad():
        model(**batch)


def test_few_tokens_go_together():
    model = adapted(models.build("llama"))
    block = model.get_submodule("model.layers.0")
    assert cut_of(block) is not None
    counts = [tiles.tile_count(4, block, torch.zeros(1, n, 32), [], {}) for n in (1023, 1024, 2047, 9999)]
    assert counts == [1, 2, 3, 4]


def test_a_layer_that_is_passed_by_is_an_error(tiled):
    model = adapted(models.build("llama"))
    block = model.get_submodule("model.layers.0")
    block.mlp.forward = lambda x: x  # another's
    with pytest.raises(StateError, match="use tiles=1"):
        model(**models.batch(model, size=4))


def test_it_comes_off_without_a_trace():
    model = models.build("bert")
    kinds = [type(module) for module in model.modules()]
    applied = tightfit.apply(model, Reversible())
    assert [type(module) for module in model.modules()] != kinds
    applied.remove()
    assert [type(module) for module in model.modules()] == kinds


@pytest.mark.parametrize("value", [0, 1.5])
def test_a_number_of_tiles(value):
    with pytest.raises((ValueError, TypeError), match="tiles"):
        Reversible(tiles=value)


FORMS = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**WIDE, num_hidden_layers=2)),
    "gpt-neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**WIDE, num_hidden_layers=2)),
    "olmo2": lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**WIDE, num_hidden_layers=2, pad_token_id=0)),
    "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(hidden_size=64, n_layer=2, n_head=2, vocab_size=120)),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_plan_knows_what_runs_in_tiles(form):
    torch.manual_seed(0)
    model = FORMS[form]()
    found = {}
    for count in (1, 4):
        plan = tightfit.plan(model, [Lora(rank=2), Reversible(tiles=count)], batch=(16, 128))
        assert abs(plan.verify().peak_error) < 1e-3
        found[count] = plan.peak_bytes
    assert (found[4] < 0.85 * found[1]) if form == "llama" else found[4] == found[1]
