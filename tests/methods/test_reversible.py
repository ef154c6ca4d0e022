"""Reversible, exact: the streams come back bit by bit, and the gradients are those of the forward that ran."""

import models
import pytest
import torch
import transformers as hf
from checks.state import gradients
from reversible_cases import close, deep, later, meft1, recorded_streams, straight, two_step

import tightfit
from tightfit import Lora, Reversible
from tightfit.core.errors import UnsupportedModelError

FAMILIES = ("llama", "bert", "gpt2", "t5", "bart", "gemma2", "roberta")
each_family = pytest.mark.parametrize("family", FAMILIES)


def bits_of(applied):
    return applied.report()["methods"]["Reversible"]["bits_behind_the_point"]


def trained(model):
    """Adapters that do something: a new lora_B is zero."""
    torch.manual_seed(11)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    return model


@pytest.fixture
def recorded(monkeypatch):
    return recorded_streams(monkeypatch)


# -- bit by bit -------------------------------------------------------------------------------------------------------


QUICK = [("llama", 3, True), ("bert", 1, False), ("llama", 0, False)]
REST = [(f, k, a) for f in ("llama", "bert") for k in (0, 1, 3, 6) for a in (False, True) if (f, k) != ("bert", 0)]
REST = [case for case in REST if case not in QUICK]


@pytest.mark.parametrize(
    ("family", "k", "autocast"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in REST)]
)
@pytest.mark.filterwarnings("ignore:Reversible.k=0.:UserWarning")
def test_streams_come_back_bit_by_bit_over_32_blocks(family, k, autocast, recorded):
    gone, back = recorded
    model = deep(family, 32, dropout=0.1)
    tightfit.apply(model, Reversible(k=k))
    gradients(model, models.batch(model), autocast=autocast)
    assert len(gone) == 32
    assert len(back) == 32  # the embedding trains, so the lowest block gives its input back as well
    assert all(torch.equal(a, b) for a, b in zip(gone, reversed(back)))


@pytest.mark.parametrize(("variant", "steps"), [("meft1", 2), ("meft2", 2), ("meft3", 2)])
@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
def test_the_published_couplings_come_back_too(variant, steps, family, recorded):
    gone, back = recorded
    model = deep(family, 6, dropout=0.1)
    tightfit.apply(model, Reversible(variant=variant, adapter_dim=4, merge="mean"))
    gradients(model, models.batch(model))
    assert len(gone) == steps * 6
    assert len(back) == len(gone) - 1  # the embedding is frozen: nobody asks for the first streams
    assert all(torch.equal(a, b) for a, b in zip(gone[1:], reversed(back)))


@pytest.mark.parametrize(
    ("family", "update", "fields", "lora"),
    [
        ("llama", two_step(4), {}, True),
        ("bert", two_step(4), {}, False),
        ("gpt2", two_step(2), {"k": 2}, True),
        ("llama", meft1(3), {"variant": "meft1", "k": 3}, False),
        pytest.param("bert", two_step(4), {}, True, marks=pytest.mark.slow),
        pytest.param("llama", two_step(1), {"k": 1}, False, marks=pytest.mark.slow),
    ],
)
def test_gradients_are_those_of_plain_autograd(family, update, fields, lora):
    recipe = [Lora(rank=2, dropout=0.1)] if lora else []
    model, slow = deep(family, 16, dropout=0.1), deep(family, 16, dropout=0.1)
    applied = tightfit.apply(model, [*recipe, Reversible(**fields)])
    if lora:
        torch.manual_seed(0)
        tightfit.apply(slow, recipe)
        slow.load_state_dict(trained(model).state_dict())
    straight(slow, bits_of(applied), update)
    batch = models.batch(model)
    (loss, found), (slow_loss, wanted) = gradients(model, batch), gradients(slow, batch)
    assert torch.equal(loss, slow_loss)
    close(found, wanted, 1e-5)


@each_family
def test_gradients_of_every_family(family):
    model, slow = models.build(family), models.build(family)
    applied = tightfit.apply(model, Reversible(k=3))
    straight(slow, bits_of(applied), two_step(3))
    batch = models.batch(model)
    (loss, found), (slow_loss, wanted) = gradients(model, batch), gradients(slow, batch)
    assert torch.equal(loss, slow_loss)
    close(found, wanted, 1e-5)


SIZE = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
TEXT = {**SIZE, "vocab_size": models.VOCABULARY, "max_position_embeddings": 64}
OTHERS = {
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(**{k: v for k, v in TEXT.items() if k[0] != "i"}, ffn_dim=64, word_embed_proj_dim=32)
    ),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**TEXT, num_key_value_heads=1, head_dim=16)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(**TEXT, num_key_value_heads=1, head_dim=16, sliding_window=4, sliding_window_pattern=2)
    ),
    "gpt-neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**TEXT)),
    "modernbert": lambda: hf.ModernBertForSequenceClassification(
        hf.ModernBertConfig(**TEXT, global_attn_every_n_layers=2, local_attention=4, pad_token_id=0)
    ),
    "distilbert": lambda: hf.DistilBertForSequenceClassification(
        hf.DistilBertConfig(dim=32, n_layers=4, n_heads=2, hidden_dim=64, vocab_size=models.VOCABULARY)
    ),
    "qwen3-moe": lambda: hf.Qwen3MoeForCausalLM(  # its balance loss takes a gradient from the routers
        hf.Qwen3MoeConfig(
            **TEXT,
            num_key_value_heads=1,
            head_dim=16,
            moe_intermediate_size=16,
            num_experts=4,
            num_experts_per_tok=2,
            output_router_logits=True,
            router_aux_loss_coef=10.0,
        )
    ),
    "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**SIZE, image_size=16, patch_size=8, num_labels=3)),
}


@pytest.mark.parametrize(
    "family",
    ["gemma3", "qwen3-moe", "vit", *later("distilbert", "gpt-neox", "modernbert", "opt", "qwen3")],
)
def test_gradients_of_other_architectures(family):
    model, slow = (models._seeded(OTHERS[family], 0.1) for _ in range(2))
    applied = tightfit.apply(model, Reversible(k=3))
    straight(slow, bits_of(applied), two_step(3))
    if family == "vit":
        batch = {"pixel_values": torch.randn(3, 3, 16, 16), "labels": torch.tensor([0, 1, 2])}
    else:
        batch = models.batch(model)
    (loss, found), (slow_loss, wanted) = gradients(model, batch), gradients(slow, batch)
    assert torch.equal(loss, slow_loss)
    close(found, wanted, 1e-5)


HALVES = ["opt", "qwen3", "gemma3", "modernbert", "distilbert"]


@pytest.mark.parametrize("family", [f if f == "opt" else pytest.param(f, marks=pytest.mark.slow) for f in HALVES])
def test_halves_of_other_architectures(family, recorded):
    gone, back = recorded
    model = models._seeded(OTHERS[family], 0.1)
    applied = tightfit.apply(model, Reversible(variant="meft3", adapter_dim=2, merge="mean"))
    grads = gradients(model, models.batch(model))[1]
    assert len(grads) == len(list(applied.parameters()))
    assert len(back) == 7
    assert all(torch.equal(a, b) for a, b in zip(gone[1:], reversed(back)))


def test_a_block_without_halves_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"gpt_neox.layers.0 is not its attention followed by its MLP"):
        tightfit.apply(OTHERS["gpt-neox"](), Reversible(variant="meft3"))
