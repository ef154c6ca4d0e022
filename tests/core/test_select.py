"""Selectors and what a model is made of."""

from __future__ import annotations

import models
import pytest
import torch
import transformers as hf
from torch import nn

import tightfit
from tightfit.core import hfmodel
from tightfit.core.select import select

STACKS = {
    "bert": [("bert.encoder.layer", 2)],
    "gpt2": [("transformer.h", 2)],
    "llama": [("model.layers", 2)],
    "gemma2": [("model.layers", 2)],
    "t5": [("encoder.block", 2), ("decoder.block", 2)],
    "bart": [("model.encoder.layers", 2), ("model.decoder.layers", 2)],
}


@pytest.mark.parametrize("family", STACKS)
def test_stacks_are_found_by_structure(family):
    found = hfmodel.stacks(models.build(family))
    assert found == [[f"{name}.{i}" for i in range(count)] for name, count in STACKS[family]]


def test_one_block_is_a_stack_only_where_there_is_no_longer_one():
    assert hfmodel.stacks(_bert(layers=1)) == [["bert.encoder.layer.0"]]
    assert hfmodel.stacks(nn.Linear(2, 2)) == []


def _bert(layers):
    size = {**models.SIZE, "num_hidden_layers": layers}
    return hf.BertForSequenceClassification(hf.BertConfig(**size, vocab_size=50))


@pytest.mark.parametrize(
    ("family", "name"), [("bert", "bert"), ("gpt2", "transformer"), ("llama", "model"), ("t5", "")]
)
def test_backbone(family, name):
    model = models.build(family)
    found, module = hfmodel.backbone(model)
    assert found == name
    assert module is model.get_submodule(name)


def test_where_patterns():
    model = models.build("bert")
    assert select(model, "query") == [f"bert.encoder.layer.{i}.attention.self.query" for i in range(2)]
    assert select(model, "query|bert.encoder.layer.1.*.key") == [
        "bert.encoder.layer.0.attention.self.query",
        "bert.encoder.layer.1.attention.self.query",
        "bert.encoder.layer.1.attention.self.key",
    ]
    assert len(select(model, "encoder.layer.[0-1].output.dense", kind=hfmodel.is_linear)) == 2


@pytest.mark.parametrize(
    ("where", "said"),
    [
        (
            "querry",
            r"'querry' matches no suitable module of BertForSequenceClassification; did you mean 'query'\?",
        ),
        ("query|vlaue", r"where='query\|vlaue': pattern 'vlaue'.*did you mean 'value'\?"),
        ("LayerNorm", r"'LayerNorm'.*suitable modules end in: classifier, dense, key, query, value"),
        ("query|", r"pattern ''"),
    ],
)
def test_a_pattern_that_matches_nothing(where, said):
    with pytest.raises(tightfit.SelectorError, match=said):
        select(models.build("bert"), where, kind=hfmodel.is_linear, method="Lora")


def test_adapters_are_looked_through():
    import peft

    model = models.build("llama")
    names = hfmodel.block_linears(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    found = hfmodel.block_linears(wrapped)
    assert [n.removeprefix("base_model.model.").removesuffix(".base_layer") for n in found] == names
    assert all(type(wrapped.get_submodule(n)) is nn.Linear for n in found)
    assert select(wrapped, "q_proj", kind=hfmodel.is_linear)[0].endswith("layers.0.self_attn.q_proj.base_layer")
    assert hfmodel.backbone(wrapped)[1] is model.model
    for name in names:
        assert type(hfmodel.stock_module(model, name)) is nn.Linear


def test_aliases_are_found_by_identity():
    model = models.build("t5")
    names = [alias.name for alias in hfmodel.aliases(model, model.shared.weight)]
    assert names == ["shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"]


@pytest.mark.parametrize(("family", "count"), [("bert", 2), ("llama", 0), ("bert-mlm", 0)])
def test_head_parameters_are_a_classifiers_only(family, count):
    assert len(hfmodel.head_parameters(models.build(family))) == count


def test_storages_are_counted_once():
    whole = torch.zeros(10)
    assert hfmodel.unique_storage_bytes([whole, whole[:5], whole.view(2, 5)]) == 40
