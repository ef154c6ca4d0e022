"""Models without weights."""

from __future__ import annotations

import models
import pytest
import torch
import transformers as hf
from checks.state import assert_same, snapshot

import tightfit
from tightfit.core.skeleton import TASKS, meta_copy

SIZE = models.SIZE
TEXT = {**SIZE, "vocab_size": 100}
BUILDS = {
    "bert": (hf.BertConfig(**TEXT), "sequence-classification"),
    "roberta": (hf.RobertaConfig(**TEXT), "token-classification"),
    "electra": (hf.ElectraConfig(**TEXT, embedding_size=16), "question-answering"),
    "distilbert": (hf.DistilBertConfig(dim=32, n_layers=2, n_heads=2, hidden_dim=64, vocab_size=100), "masked-lm"),
    "gpt2": (hf.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=100), "causal-lm"),
    "llama": (hf.LlamaConfig(**TEXT), "causal-lm"),
    "qwen3": (hf.Qwen3Config(**TEXT, num_key_value_heads=1, head_dim=16), "causal-lm"),
    "gemma2": (hf.Gemma2Config(**TEXT, num_key_value_heads=1, head_dim=16), "causal-lm"),
    "t5": (hf.T5Config(d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, vocab_size=100), "seq2seq-lm"),
    "vit": (hf.ViTConfig(**SIZE, image_size=16, patch_size=8, num_labels=3), "image-classification"),
}


@pytest.mark.parametrize("family", BUILDS)
def test_a_skeleton_has_the_shapes_and_no_memory(family):
    config, task = BUILDS[family]
    model = tightfit.skeleton(config, task=task)
    assert all(p.is_meta for p in model.parameters())
    assert model.training
    real = getattr(hf, TASKS[task]).from_config(config)
    assert type(model) is type(real)
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
    assert {n for n, p in model.named_parameters()} == {n for n, p in real.named_parameters()}  # ties too


def test_the_task_the_config_names_and_its_absence():
    config = models.build("bert").config
    assert type(tightfit.skeleton(config)).__name__ == "BertModel"
    config.architectures = ["BertForTokenClassification"]
    assert type(tightfit.skeleton(config)).__name__ == "BertForTokenClassification"


def test_overrides_do_not_reach_the_given_config():
    config, task = BUILDS["bert"]
    model = tightfit.skeleton(config, task=task, num_labels=7, hidden_size=16, dtype=torch.bfloat16)
    assert model.classifier.weight.shape == (7, 16)
    assert model.dtype == torch.bfloat16
    assert config.hidden_size == 32


def test_from_a_folder(tmp_path):
    models.build("llama").save_pretrained(tmp_path)
    assert type(tightfit.skeleton(tmp_path)).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("call", "kind", "said"),
    [
        (
            lambda: tightfit.skeleton(BUILDS["bert"][0], task="causal"),
            ValueError,
            "got 'causal'.*did you mean 'causal-lm'",
        ),
        (
            lambda: tightfit.skeleton(BUILDS["bert"][0], hiden_size=8),
            ValueError,
            "BertConfig has no such field; did you mean",
        ),
        (
            lambda: tightfit.skeleton(BUILDS["vit"][0], task="causal-lm"),
            tightfit.UnsupportedModelError,
            r"task='causal-lm'\): transformers has no such model for a ViTConfig",
        ),
        (lambda: tightfit.skeleton(3), tightfit.UnsupportedModelError, "got int, accepted is a transformers config"),
        (lambda: tightfit.skeleton("no/such-model"), tightfit.UnsupportedModelError, "no config could be read"),
    ],
)
def test_what_cannot_be_built(call, kind, said):
    with pytest.raises(kind, match=said):
        call()


@pytest.mark.parametrize("family", ["llama-tied", "t5", "bart"])
def test_a_meta_copy_keeps_ties_and_flags_and_leaves_the_model(family):
    model = models.build(family)
    next(model.parameters()).requires_grad_(False)
    before = snapshot(model)
    twin = meta_copy(model)
    assert_same(before, snapshot(model))
    assert all(t.is_meta for t in twin.state_dict().values())
    assert all(b.is_meta for b in twin.buffers())
    assert [(n, p.requires_grad) for n, p in twin.named_parameters()] == [
        (n, p.requires_grad) for n, p in model.named_parameters()
    ]
    assert twin.get_input_embeddings().weight is twin.get_output_embeddings().weight


@pytest.mark.parametrize("family", ["bert", "gpt2", "vit"])
def test_a_skeleton_can_be_planned(family):
    config, task = BUILDS[family]
    model = tightfit.skeleton(config, task=task)
    plan = tightfit.plan(model, tightfit.Lora(rank=2), batch=(2, 8), optimizer="sgd")
    assert plan.peak_bytes > 0
    assert all(p.is_meta for p in model.parameters())
