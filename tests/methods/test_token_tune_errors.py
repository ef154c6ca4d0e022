"""TokenTune refuses what it cannot do, before it does anything."""

from __future__ import annotations

import math

import models
import pytest
import token_tune_cases as cases
import torch
import transformers as hf
from token_tune_cases import TEXT, batch, build

import tightfit
from tightfit import Lora, TokenTune, UnsupportedModelError, chain


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({}, ValueError, "exactly one"),
        ({"ratio": 0.3, "count": 4}, ValueError, "exactly one"),
        ({"ratio": 0.0}, ValueError, r"\(0, 1\]"),
        ({"ratio": 1.01}, ValueError, r"\(0, 1\]"),
        ({"ratio": -0.1}, ValueError, r"\(0, 1\]"),
        ({"ratio": math.nan}, ValueError, "nan"),
        ({"ratio": True}, TypeError, "bool"),
        ({"ratio": 1}, TypeError, "count=1"),
        ({"ratio": "0.3"}, TypeError, "str"),
        ({"count": 0}, ValueError, ">= 1"),
        ({"count": True}, TypeError, "bool"),
        ({"count": 4.0}, TypeError, "float"),
        ({"ratio": 0.3, "policy": "radnom"}, ValueError, "did you mean 'random'"),
        ({"ratio": 0.3, "normalise": "none"}, ValueError, "selected"),
        ({"ratio": 0.3, "schedule": "layer"}, ValueError, "block"),
        ({"ratio": 0.3, "unbiased": 1}, TypeError, "True or False"),
        ({"ratio": 0.3, "unbiased": True}, ValueError, "bernoulli"),
        ({"ratio": 0.3, "policy": "suffix", "unbiased": True}, ValueError, "bernoulli"),
        ({"ratio": 0.5, "kv_grad_scale": 2.1}, ValueError, r"\[1, 2.0\]"),
        ({"ratio": 0.5, "kv_grad_scale": 0.9}, ValueError, r"\[1, 2.0\]"),
        ({"ratio": 0.5, "policy": "bernoulli", "unbiased": True, "kv_grad_scale": 2.0}, ValueError, "sets the scale"),
        ({"ratio": 0.5, "schedule": "suffix"}, ValueError, "policy='suffix'"),
        ({"ratio": 0.5, "schedule": "block", "policy": "score"}, ValueError, "schedule='model'"),
        ({"ratio": 0.5, "seed": -1}, ValueError, "seed"),
    ],
)
def test_bad_fields(fields, error, said):
    with pytest.raises(error, match=said):
        TokenTune(**fields)


def test_ratio_one_is_all_tokens_and_count_one_is_one():
    model = build("bert-class")
    inputs = batch(model)
    wanted = cases.gradients(model, model(**inputs).loss)
    with tightfit.apply(model, TokenTune(ratio=1.0)):
        found = cases.gradients(model, model(**inputs).loss)
        assert all(torch.equal(found[n], g) for n, g in wanted.items())
    with tightfit.apply(model, TokenTune(count=1)) as applied:
        model(**inputs).loss.backward()
        assert applied.report()["methods"]["TokenTune"]["selected"] == 1


@pytest.mark.parametrize(
    ("name", "fields", "error", "said"),
    [
        ("llama", {"count": 1}, ValueError, "must keep 2 tokens"),
        ("bert", {"ratio": 0.5, "policy": "bernoulli", "unbiased": True}, ValueError, "no causal language model"),
        ("llama-class", {"ratio": 0.5, "policy": "bernoulli", "unbiased": True}, ValueError, "no causal"),
        ("bert", {"ratio": 0.5, "policy": "suffix", "schedule": "suffix"}, ValueError, "no decoder"),
        ("bart", {"ratio": 0.5, "policy": "suffix", "schedule": "suffix"}, ValueError, "no decoder"),
        ("vit", {"ratio": 0.5, "schedule": "block"}, ValueError, "schedule='model'"),
    ],
)
def test_fields_that_do_not_go_with_the_model(name, fields, error, said):
    model = build(name)
    with pytest.raises(error, match=said):
        tightfit.apply(model, TokenTune(**fields))
    assert model.config._attn_implementation == "sdpa"


SIZE = {k: v for k, v in TEXT.items() if k != "max_position_embeddings"}


def _qwen3_next():
    config = hf.Qwen3NextConfig(
        **TEXT,
        num_key_value_heads=2,
        head_dim=8,
        linear_num_value_heads=2,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
    )
    return hf.Qwen3NextForCausalLM(config)


def _t5():
    config = hf.T5Config(d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, vocab_size=50)
    return hf.T5ForConditionalGeneration(config)


def _gemma4():
    size = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    layers = {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2, "hidden_size_per_layer_input": 4}
    words = {"vocab_size": 50, "vocab_size_per_layer_input": 50, "pad_token_id": 0}
    return hf.Gemma4ForCausalLM(hf.Gemma4TextConfig(**size, **layers, **words, global_head_dim=8))


REFUSED = {
    "gemma4": (_gemma4, "reads an embedding of its own"),
    "deepseek-v32": (models.deepseek_sparse, "goes by the name of the attention"),
    "bloom": (lambda: hf.BloomForCausalLM(hf.BloomConfig(vocab_size=50, hidden_size=16, n_layer=2, n_head=4)), "ALiBi"),
    "falcon": (
        lambda: hf.FalconForCausalLM(
            hf.FalconConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, alibi=True)
        ),
        "ALiBi",
    ),
    "mpt": (
        lambda: hf.MptForCausalLM(hf.MptConfig(vocab_size=50, d_model=16, n_layers=2, n_heads=4)),
        "MptForCausalLM",
    ),
    "t5": (_t5, "relative position bias"),
    "mamba": (
        lambda: hf.MambaForCausalLM(hf.MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, state_size=4)),
        "mixes tokens outside",
    ),
    "qwen3-next": (_qwen3_next, "mixes tokens outside|mix tokens outside"),
    "mpnet": (lambda: hf.MPNetForSequenceClassification(hf.MPNetConfig(**TEXT)), "relative|registry"),
    "deberta": (lambda: hf.DebertaV2ForSequenceClassification(hf.DebertaV2Config(**TEXT)), "registry"),
    "albert": (lambda: hf.AlbertForSequenceClassification(hf.AlbertConfig(**TEXT, embedding_size=8)), "shared weights"),
    "esm": (
        lambda: hf.EsmForSequenceClassification(
            hf.EsmConfig(**TEXT, pad_token_id=0, mask_token_id=3, position_embedding_type="rotary")
        ),
        "EsmEmbeddings look at the padding of whole rows",
    ),
    "bart-class": (
        lambda: hf.BartForSequenceClassification(
            hf.BartConfig(d_model=16, encoder_layers=1, decoder_layers=1, vocab_size=50, encoder_attention_heads=2)
        ),
        "decoder side",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_mix_tokens_elsewhere_are_refused(name):
    make, reason = REFUSED[name]
    model = make()
    classes = [type(m) for m in model.modules()]
    with pytest.raises(UnsupportedModelError, match=reason):
        tightfit.apply(model, TokenTune(ratio=0.5))
    assert [type(m) for m in model.modules()] == classes
    assert list(TokenTune.candidates(model)) == []
    with pytest.raises(UnsupportedModelError, match=reason):
        tightfit.plan(model, TokenTune(ratio=0.5), batch=(2, 8))


def test_what_the_models_own_code_raises_in_the_check_is_a_refusal():
    model = build("llama")
    mlp = type(model.model.layers[1].mlp)

    class Counting(mlp):  # it needs all tokens
        def forward(self, x):
            return super().forward(x).view(x.shape[0], 12, -1)

    model.model.layers[1].mlp.__class__ = Counting
    with pytest.raises(UnsupportedModelError, match=r"selected tokens apart, ended in RuntimeError: shape '\[2, 12"):
        tightfit.apply(model, TokenTune(ratio=0.5))


def test_the_check_finds_what_structure_does_not_show():
    model = build("llama")
    mlp = type(model.model.layers[1].mlp)

    class Mixing(mlp):  # each token looks at its neighbour
        def forward(self, x):
            return super().forward(x) + 0.01 * x.roll(1, 1)

    model.model.layers[1].mlp.__class__ = Mixing
    implementation = model.config._attn_implementation
    with pytest.raises(UnsupportedModelError, match=r"off by .* mixed somewhere outside of attention"):
        tightfit.apply(model, TokenTune(ratio=0.5))
    assert model.config._attn_implementation == implementation
    assert model.training


LEARNED = {
    "doge": lambda: hf.DogeForCausalLM(hf.DogeConfig(**TEXT, num_key_value_heads=2)),
    "beit": lambda: hf.BeitForImageClassification(
        hf.BeitConfig(**SIZE, image_size=12, patch_size=4, use_relative_position_bias=True)
    ),
}


@pytest.mark.parametrize("name", LEARNED)
def test_attention_with_a_learned_mask_is_found(name):
    model = LEARNED[name]()
    with pytest.raises(UnsupportedModelError, match="what it adds to its attention is learned"):
        tightfit.apply(model, TokenTune(ratio=0.5))
    if name == "doge":
        with pytest.raises(UnsupportedModelError, match="what it adds to its attention is learned"):
            tightfit.apply(model, chain(Lora(), TokenTune(ratio=0.5)))
        with pytest.raises(UnsupportedModelError, match="what it adds to its attention is learned"):
            tightfit.plan(model, TokenTune(ratio=0.5), batch=(2, 8))
    assert model.config._attn_implementation == "sdpa"


def test_attention_that_never_gets_the_context_is_found():
    model = build("llama")
    attention = type(model.model.layers[1].self_attn)

    class Dropping(attention):
        def forward(self, hidden_states, position_embeddings, attention_mask, **kwargs):
            return super().forward(hidden_states, position_embeddings, attention_mask)

    model.model.layers[1].self_attn.__class__ = Dropping
    with pytest.raises(UnsupportedModelError, match="of its 3 blocks, attention in only 2"):
        tightfit.apply(model, TokenTune(ratio=0.5))


def test_flash_attention_is_refused():
    model = build("llama")
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(UnsupportedModelError, match="attn_implementation='sdpa'"):
        tightfit.apply(model, TokenTune(ratio=0.5))


def test_eager_attention_works():
    model = build("llama")
    model.set_attn_implementation("eager")
    inputs = batch(model)
    with cases.doubles():
        pos = cases.positions(model, inputs)
        with tightfit.apply(model, TokenTune(ratio=0.5)):
            found = cases.gradients(model, model(**inputs, token_positions=pos).loss)
        model.set_attn_implementation("sdpa")
        wanted = cases.gradients(model, cases.reference_loss(model, inputs, pos))
    assert cases.gap(found, wanted) < 1e-10


@pytest.fixture(scope="module")
def llama():
    model = build("llama")
    tightfit.apply(model, TokenTune(ratio=0.5))
    return model


@pytest.mark.parametrize(
    ("positions", "said"),
    [
        ([[0, 10], [0, 1], [0, 1]], r"got 10, accepted is -1 or \[0, 9\]"),
        ([[0, -2], [0, 1], [0, 1]], "got -2"),
        ([[0, 3, 3], [0, 1, 2], [0, 1, 2]], "twice"),
        ([[0, 1], [0, 1], [0, 9]], "padding"),
        ([[0, 1]], "shape"),
        ([[0.0, 1.0]] * 3, "float"),
    ],
)
def test_bad_positions(llama, positions, said):
    with pytest.raises(ValueError, match=said):
        llama(**batch(llama), token_positions=torch.tensor(positions))


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        (torch.full((3, 10), math.nan), "not finite"),
        (torch.full((3, 10), math.inf), "not finite"),
        (torch.ones(3, 9), "shape"),
    ],
)
def test_bad_scores(scores, said):
    model = build("llama")
    with tightfit.apply(model, TokenTune(ratio=0.5, policy="score")), pytest.raises(ValueError, match=said):
        model(**batch(model), token_scores=scores)


def test_scores_that_could_never_be_drawn():
    model = build("llama")
    recipe = TokenTune(ratio=0.5, policy="bernoulli", unbiased=True)
    scores = torch.ones(3, 10)
    scores[0, 3] = 0
    with tightfit.apply(model, recipe), pytest.raises(ValueError, match="never be drawn"):
        model(**batch(model), token_scores=scores)


def test_a_cache_in_training(llama):
    from transformers import DynamicCache

    with pytest.raises(ValueError, match="past_key_values"):
        llama(**batch(llama), past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="logits_to_keep"):
        llama(**batch(llama), logits_to_keep=1)


def test_right_padding_with_a_cached_prefix():
    model = build("llama")
    with tightfit.apply(model, TokenTune(count=4, policy="suffix", schedule="suffix")):
        with pytest.raises(ValueError, match="padding_side='left'"):
            model(**batch(model, "right"))
        model(**batch(model, "left")).loss.backward()


def test_checkpointing_with_a_cached_prefix_is_refused():
    model = build("llama")
    tokens = TokenTune(count=4, policy="suffix", schedule="suffix")
    recipe = chain(tokens, tightfit.Checkpointing())
    with pytest.raises(tightfit.StateError, match="schedule='model'"):
        tightfit.apply(model, recipe)
    with tightfit.apply(model, tokens):
        model.activation_checkpointing_enable()
        with pytest.raises(tightfit.StateError, match="schedule='model'"):
            model(**batch(model, None))


def test_another_method_that_takes_over_the_blocks_is_refused():
    from checks.transforms import Tape

    model = build("llama")
    with pytest.raises(tightfit.ConflictError, match="Tape and TokenTune"):
        tightfit.apply(model, chain(TokenTune(ratio=0.5), Tape()))


def test_a_failed_step_leaves_nothing_behind(llama):
    with pytest.raises(ValueError, match="twice"):
        llama(**batch(llama), token_positions=torch.tensor([[1, 1]] * 3))
    llama(**batch(llama)).loss.backward()


def test_adapters_that_freeze_everything_else_still_pass_the_check():
    model = build("llama")
    with tightfit.apply(model, chain(Lora(rank=2), TokenTune(ratio=0.5))):
        model(**batch(model)).loss.backward()
