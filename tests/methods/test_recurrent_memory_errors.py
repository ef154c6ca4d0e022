"""What RecurrentMemory refuses, and how it says so."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from models import build as tiny
from recurrent_memory_cases import BERT, CLASSIFIERS, DECODERS, GEMMA, ROPE, applied, batch, build

import tightfit
from tightfit import RecurrentMemory

GEMMA3N = {
    **GEMMA,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": ROPE["vocab_size"],
    "laurel_rank": 4,
    "activation_sparsity_pattern": [0.0, 0.0],
}


@pytest.mark.parametrize(
    ("fields", "error", "match"),
    [
        ({"tokens": -1}, ValueError, r"tokens=\.\.\.\): got -1, accepted is an int >= 0"),
        ({"tokens": 2.0}, TypeError, r"tokens"),
        ({"tokens": True}, TypeError, r"tokens"),
        ({"segment": 0}, ValueError, r"segment=\.\.\.\): got 0, accepted is an int >= 1"),
        ({"segment": float("nan")}, TypeError, r"segment"),
        ({"bptt": "half"}, ValueError, r"bptt=\.\.\.\): got 'half', accepted is 'full', 'none' or 'block:D'"),
        ({"bptt": "block:-1"}, ValueError, r"bptt"),
        ({"bptt": "block:"}, ValueError, r"bptt"),
        ({"bptt": 2}, TypeError, r"bptt"),
        ({"attention": "both"}, ValueError, r"attention"),
        ({"align": "centre"}, ValueError, r"align"),
        ({"replay": 1}, TypeError, r"replay"),
        ({"curriculum": 0}, ValueError, r"curriculum"),
        ({"seed": -1}, ValueError, r"seed"),
    ],
)
def test_a_field_out_of_range_is_refused_at_construction(fields, error, match):
    with pytest.raises(error, match=match):
        RecurrentMemory(**fields)


@pytest.mark.parametrize(
    ("make", "fields", "match"),
    [
        (DECODERS["gpt2"], {"tokens": 30, "segment": 10}, r"positions for 64 tokens.*segments of 1 to 4"),
        (DECODERS["gpt2"], {"tokens": 32}, r"segments of 1 to 0"),
        (DECODERS["llama"], {"tokens": 2, "segment": 61}, r"segments of 1 to 60"),
        (CLASSIFIERS["bert"], {"tokens": 10, "segment": 52}, r"segments of 1 to 51"),
        (CLASSIFIERS["bert"], {"attention": "causal"}, r"is an encoder"),
        (DECODERS["gpt2"], {"align": "right"}, r"accepted is 'left'"),
    ],
)
def test_values_that_do_not_fit_the_model(make, fields, match):
    model = build(make)
    with pytest.raises(ValueError, match=match):
        tightfit.apply(model, RecurrentMemory(**fields))
    assert type(model).__name__ in repr(type(model)) and not hasattr(model.base_model, "memory_tokens")


def test_the_window_is_filled_by_default():
    model = build(DECODERS["gpt2"])
    report = tightfit.apply(model, RecurrentMemory(tokens=10)).report()
    assert report["methods"]["RecurrentMemory"]["segment"] == 64 - 20
    model = build(CLASSIFIERS["bert"])
    report = tightfit.apply(model, RecurrentMemory(tokens=2)).report()
    assert report["methods"]["RecurrentMemory"]["segment"] == 64 - 5


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: tiny("t5"), r"encoder-decoder"),
        (lambda: hf.BertForQuestionAnswering(hf.BertConfig(**BERT)), r"its head is none of"),
        (
            lambda: hf.ElectraForSequenceClassification(hf.ElectraConfig(**BERT, embedding_size=8)),
            r"8 wide and its .* 24",
        ),
        (
            lambda: hf.ViTForImageClassification(
                hf.ViTConfig(hidden_size=24, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8)
            ),
            r"does not take text",
        ),
        (
            lambda: hf.BloomForCausalLM(hf.BloomConfig(hidden_size=24, n_head=2, n_layer=1, vocab_size=50)),
            r"does not say whether it is causal",
        ),
        (
            lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**ROPE, attn_implementation="flex_attention")),
            r"takes no mask for each pair",
        ),
        (
            lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**ROPE, num_local_experts=2, output_router_logits=True)),
            r"output_router_logits is on",
        ),
        (
            lambda: hf.Gemma3nForCausalLM(hf.Gemma3nTextConfig(**GEMMA3N)),
            r"makes more of input_ids than their embeddings",
        ),
        (
            lambda: hf.EsmForMaskedLM(hf.EsmConfig(**BERT, mask_token_id=3)),
            r"makes more of input_ids than their embeddings",
        ),
        (
            lambda: hf.IBertForSequenceClassification(hf.IBertConfig(**BERT)),
            r"no plain table of token embeddings",
        ),
    ],
)
def test_models_that_cannot_carry_a_memory(make, match):
    with pytest.raises(tightfit.UnsupportedModelError, match=match):
        tightfit.apply(make(), RecurrentMemory(tokens=2, segment=4))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"past_key_values": object()}, r"past_key_values were given"),
        ({"inputs_embeds": torch.zeros(3, 17, 24)}, r"got both of input_ids and inputs_embeds"),
        ({"input_ids": None}, r"got neither"),
        ({"input_ids": torch.zeros(0, 17, dtype=torch.long)}, r"a batch of shape \(0, 17\)"),
        ({"input_ids": torch.zeros(3, 0, dtype=torch.long)}, r"a batch of shape \(3, 0\)"),
        ({"labels": torch.zeros(3, 16, dtype=torch.long)}, r"labels: got shape \(3, 16\).*\(3, 17\)"),
        ({"attention_mask": torch.ones(3, 16)}, r"attention_mask: got shape \(3, 16\)"),
        ({"attention_mask": torch.ones(3, 1, 17, 17)}, r"attention_mask: got shape"),
        (
            {"attention_mask": torch.tensor([[1] * 17, [1] * 3 + [0] + [1] * 13, [1] * 17])},
            r"row 1 has padding between",
        ),
        ({"position_ids": torch.arange(17)[None]}, r"position_ids were given"),
        ({"output_hidden_states": True}, r"output_hidden_states"),
        ({"output_router_logits": True}, r"output_router_logits"),
        ({"logits_to_keep": 1}, r"logits_to_keep"),
    ],
)
def test_calls_that_cannot_be_cut(change, match):
    model = build(DECODERS["gpt2"])
    applied(model, tokens=2, segment=5)
    with pytest.raises(ValueError, match=match):
        model(**{**batch(), **change})


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"cache_implementation": "static"}, r"generate\(cache_implementation=\.\.\.\)"),
        ({"prompt_lookup_num_tokens": 2}, r"prompt_lookup_num_tokens"),
        ({"inputs_embeds": torch.zeros(1, 4, 24), "inputs": None}, r"needs the prompt's input_ids"),
    ],
)
def test_generation_that_is_refused(given, match):
    model = build(DECODERS["gpt2"], double=False).eval()
    applied(model, tokens=2, segment=5)
    with pytest.raises(ValueError, match=match):
        model.generate(**{"inputs": torch.ones(1, 4, dtype=torch.long), "max_new_tokens": 2, **given})


def test_a_stock_checkpoint_holds_no_memory(tmp_path):
    model = build(DECODERS["gpt2"])
    out = applied(model, tokens=2, segment=5)
    for leave in (out.merge, lambda: out.export(tmp_path)):
        with pytest.raises(tightfit.StateError, match=r"what RecurrentMemory trained has no place in a stock GPT2"):
            leave()


def test_without_memory_a_checkpoint_is_stock(tmp_path):
    model = build(DECODERS["gpt2"])
    out = tightfit.apply(model, RecurrentMemory(tokens=0, segment=5))
    out.export(tmp_path)
    again = hf.GPT2LMHeadModel.from_pretrained(tmp_path)
    ids = batch((5,))["input_ids"]
    torch.testing.assert_close(again.double()(input_ids=ids).logits, out.merge()(input_ids=ids).logits)


@pytest.mark.parametrize(
    "other",
    [tightfit.Checkpointing(offload=True), tightfit.LadderSide(reduction=4)],
    ids=lambda other: type(other).__name__,
)
def test_methods_that_do_not_go_with_it(other):
    model = tiny("llama")
    with pytest.raises(tightfit.ConflictError, match=rf"{type(other).__name__} and RecurrentMemory both"):
        tightfit.apply(model, tightfit.chain(other, RecurrentMemory(tokens=2, segment=4)))
