"""Reversible: what cannot be run in reverse, and bad input."""

import models
import pytest
import torch
import transformers as hf
from checks.state import assert_same, gradients, snapshot
from reversible_cases import deep
from torch import nn

import tightfit
from tightfit import Checkpointing, Reversible
from tightfit.core.errors import ConflictError, StateError, UnsupportedModelError
from tightfit.core.memory import saved_bytes

# -- what cannot be run in reverse ------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """Draws numbers that no random state brings back."""

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator()

    def forward(self, x):
        return x + 0.01 * torch.randn(x.shape, generator=self.generator)


def noisy(layers=4):
    model = deep("llama", layers)
    norm = model.model.layers[1].post_attention_layernorm
    model.model.layers[1].post_attention_layernorm = nn.Sequential(norm, Noisy())
    return model


def test_a_block_that_does_not_repeat_keeps_its_streams():
    model = noisy()
    with pytest.warns(
        UserWarning, match=r"second run of model.layers.1 gave other bits than the first, so these blocks"
    ):
        applied = tightfit.apply(model, Reversible())
    assert applied.report()["methods"]["Reversible"]["kept_blocks"] == ["model.layers.1"]
    batch = models.batch(model)
    found = gradients(model, batch)[1]
    assert all(torch.isfinite(g).all() for g in found.values())
    few, many = kept_by(model, batch), kept_by(deep_reversed(4), batch)
    assert few - many == 2 * 3 * 9 * 32 * 4 - 3 * 9 * 32 // 2
    applied.remove()
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match=r"strict=True.*second run of model.layers.1"):
        tightfit.apply(model, Reversible(strict=True))
    assert_same(before, snapshot(model))


def deep_reversed(layers):
    model = deep("llama", layers)
    tightfit.apply(model, Reversible())
    return model


def kept_by(model, batch):
    return saved_bytes(lambda: model(**batch).loss.backward())


def test_overflow_and_what_is_no_number_name_the_block():
    model = deep("llama", 4)
    tightfit.apply(model, Reversible(bits=28))
    model.model.embed_tokens.weight.data.mul_(1e3)
    with pytest.raises(
        StateError, match=r"at block model.layers.0 .* with 28 bits .* \(up to 2\).*Reversible\(bits=24\)"
    ):
        model(**models.batch(model))
    model = deep_reversed(4)
    model.model.layers[2].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match=r"at block model.layers.2 the states are infinite, not a number"):
        model(**models.batch(model))
    with pytest.raises(StateError, match=r"own states are not finite at block model.layers.2"):
        broken = deep("llama", 4)
        broken.model.layers[2].mlp.down_proj.weight.data[0, 0] = float("nan")
        tightfit.apply(broken, Reversible())


@pytest.mark.parametrize("groups", [1, 2])
def test_blocks_that_run_several_times_each(groups):
    sizes = {**models.SIZE, "num_hidden_layers": 4, "num_hidden_groups": groups, "embedding_size": 16}
    model = hf.AlbertForSequenceClassification(hf.AlbertConfig(**sizes, vocab_size=models.VOCABULARY))
    if groups > 1:
        with pytest.raises(UnsupportedModelError, match="runs each of them several times"):
            tightfit.apply(model, Reversible())
    else:  # a stack of one block, four times
        assert torch.isfinite(gradients(tightfit.apply(model, Reversible()).model, models.batch(model))[0])


def test_a_model_that_changes_states_between_blocks():
    model = deep_reversed(4)
    model.model.layers[2].register_forward_pre_hook(lambda m, args: (args[0] * 1.0, *args[1:]))
    with pytest.raises(StateError, match=r"input of block model.layers.2 is not the output of the block before it"):
        model(**models.batch(model))
    model = deep("llama", 4)
    model.model.layers[2].register_forward_pre_hook(lambda m, args: (args[0] * 1.0, *args[1:]))
    with pytest.raises(UnsupportedModelError, match=r"changes the states between its blocks, before model.layers.2"):
        tightfit.apply(model, Reversible())
    applied = tightfit.apply(model, Reversible(span=(2, 4)))
    assert torch.isfinite(gradients(applied.model, models.batch(model))[0])


def test_models_it_does_not_fit():
    import transformers as hf

    size = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    with pytest.raises(UnsupportedModelError, match="has no stack of blocks"):
        tightfit.apply(nn.Sequential(nn.Linear(2, 2)), Reversible())
    with pytest.raises(UnsupportedModelError, match=r"meft3'\): block encoder.block.0 has 0 attention modules"):
        tightfit.apply(models.build("t5"), Reversible(variant="meft3"))
    size |= {"num_hidden_layers": 2, "vocab_size": 120}
    moe = hf.MixtralForCausalLM(hf.MixtralConfig(**size, num_local_experts=2, num_key_value_heads=2))
    with pytest.raises(UnsupportedModelError, match=r"block model.layers.0 has no MLP of two linear layers"):
        tightfit.apply(moe, Reversible(adapter_dim=2))
    assert torch.isfinite(gradients(tightfit.apply(moe, Reversible()).model, models.batch(moe))[0])
    model = models.build("llama")
    model.model.layers[0].forward = None
    with pytest.raises(
        UnsupportedModelError, match=r"could not be tried on an example batch .* such as Reversible\(bits=20\)"
    ):
        tightfit.apply(model, Reversible())
    model = models.build("llama")
    model.activation_checkpointing_enable()
    with pytest.raises(StateError, match=r"gradient checkpointing of this LlamaForCausalLM is on already"):
        tightfit.apply(model, Reversible())
    model = models.build("llama")
    with pytest.raises(ConflictError, match=r"Checkpointing and Reversible both take over model.layers.0"):
        tightfit.apply(model, [Checkpointing(), Reversible()])
    applied = tightfit.apply(model, Reversible())
    with pytest.raises(StateError, match="already carries the recipe"):
        tightfit.apply(model, Reversible())
    applied.remove()


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        ({"variant": "revnet"}, ValueError, r"Reversible\(variant=...\): got 'revnet', accepted is one of"),
        ({"merge": "sum"}, ValueError, r"Reversible\(merge=...\): got 'sum'"),
        ({"k": 13}, ValueError, r"Reversible\(k=...\): got 13, accepted is an int in \[0, 12\]"),
        ({"k": 0.5}, TypeError, r"Reversible\(k=...\): got 0.5 \(float\)"),
        ({"k": True}, TypeError, r"Reversible\(k=...\): got True"),
        ({"exact": 1}, TypeError, r"Reversible\(exact=...\): got 1"),
        (
            {"variant": "meft1", "lam": 0.0},
            ValueError,
            r"Reversible\(lam=...\): got 0.0, accepted is a number in \(0, 1\]",
        ),
        ({"variant": "meft1", "lam": float("nan"), "exact": False}, ValueError, r"Reversible\(lam=...\): got nan"),
        (
            {"variant": "meft2", "beta": 1.5},
            ValueError,
            r"Reversible\(beta=...\): got 1.5, accepted is a number in \(0, 1\]",
        ),
        (
            {"variant": "meft1", "lam": 0.1},
            ValueError,
            r"lam=0.1\): integer streams need a power of two from 2\^-12 to 1",
        ),
        ({"variant": "meft1", "beta": 2.0**-13}, ValueError, r"integer streams need a power of two"),
        ({"lam": 0.5}, ValueError, r"lam=0.5\): the factor of 'two_step' is 2\^-k; give k"),
        ({"anchors": 2}, ValueError, r"anchors=2\): integer streams have no error to limit"),
        ({"allow_inexact": True}, ValueError, r"allow_inexact=True\): integer streams have no error"),
        ({"exact": False, "bits": 20}, ValueError, r"bits=20, exact=False\)"),
        ({"bits": 29}, ValueError, r"Reversible\(bits=...\): got 29"),
        ({"anneal": 1.5}, ValueError, r"Reversible\(anneal=...\): got 1.5"),
        ({"anneal": 0.5, "adapter_dim": 4}, ValueError, r"anneal=0.5\): only 'two_step' without adapters"),
        ({"anneal": 0.5, "variant": "meft1"}, ValueError, r"anneal=0.5\): only 'two_step'"),
        ({"adapter_dim": 0}, ValueError, r"Reversible\(adapter_dim=...\): got 0"),
        ({"adapter_dropout": 1.0}, ValueError, r"Reversible\(adapter_dropout=...\): got 1.0"),
        ({"span": (3, 3)}, ValueError, r"Reversible\(span=...\): got \(3, 3\), accepted is 0 <= first < end"),
        ({"span": (-1, 3)}, ValueError, r"Reversible\(span=...\): got \(-1, 3\)"),
        ({"span": 3}, TypeError, r"Reversible\(span=...\): got 3, accepted is a pair of ints"),
    ],
)
def test_wrong_fields_are_refused_at_construction(fields, kind, message):
    with pytest.raises(kind, match=message):
        Reversible(**fields)


def test_wrong_places_are_refused_when_applied():
    model = deep("llama", 4)
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"span=\(2, 5\)\): LlamaForCausalLM has 4 blocks, accepted is an end of at most 4"
    ):
        tightfit.apply(model, Reversible(span=(2, 5)))
    assert_same(before, snapshot(model))
    with pytest.warns(UserWarning, match=r"Reversible\(k=0\): with a factor of 1"):
        loose = Reversible(k=0)
    with pytest.raises(ValueError, match=r"may grow .* times over 40 blocks, too far for 32 bits"):
        tightfit.apply(deep("bert", 40), loose)
