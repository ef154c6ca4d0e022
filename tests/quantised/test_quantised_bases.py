"""Methods on a frozen quantised base: gradients beside the dequantised model's, bytes beside the real ones."""

from __future__ import annotations

import gc
import json
import os
import re
import sys
import warnings
from pathlib import Path

import models
import pytest
import torch
import transformers as hf
from torch import nn

import tightfit
from tightfit import (
    Checkpointing,
    FusedOps,
    LadderSide,
    Lora,
    Losa,
    Mesa,
    PartialEmbedding,
    RecurrentMemory,
    Reversible,
    Sherl,
    SparseAdapter,
    TokenTune,
    Velora,
    WtaCrs,
    chain,
)
from tightfit.core import hfmodel
from tightfit.core.memory import live_bytes
from tightfit.core.quantised import is_quantised, layer_bytes, packed_for_inference, storage_bytes

bnb = pytest.importorskip("bitsandbytes")
has_avx512bf16 = getattr(bnb.functional, "has_avx512bf16", lambda: False)

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "docs" / "data" / "quantised.json"


def four_bit(old):
    return bnb.nn.Linear4bit(old.in_features, old.out_features, bias=old.bias is not None, compute_dtype=torch.float32)


def eight_bit(old):
    return bnb.nn.Linear8bitLt(old.in_features, old.out_features, bias=old.bias is not None, has_fp16_weights=False)


def four_bits_in_bytes():
    from torchao.quantization.granularity import PerGroup

    return {"weight_dtype": torch.int4, "granularity": PerGroup(32)}


def by_torchao(name, options=dict):
    def change(model):
        torchao = pytest.importorskip("torchao.quantization")
        wanted = set(hfmodel.block_linears(model))
        torchao.quantize_(model, getattr(torchao, name)(**options()), filter_fn=lambda module, place: place in wanted)

    return change


def by_bitsandbytes(make):
    def change(model):
        for name in hfmodel.block_linears(model):
            parent, _, attribute = name.rpartition(".")
            old = model.get_submodule(name)
            new = make(old)
            new.load_state_dict(old.state_dict())
            setattr(model.get_submodule(parent), attribute, new.to("cpu"))

    return change


KINDS = {
    "bitsandbytes 4-bit": by_bitsandbytes(four_bit),
    "bitsandbytes 8-bit": by_bitsandbytes(eight_bit),
    "torchao int8": by_torchao("Int8WeightOnlyConfig"),
    "torchao float8": by_torchao("Float8WeightOnlyConfig"),
    "torchao intx 4-bit": by_torchao("IntxWeightOnlyConfig", four_bits_in_bytes),
}
RECIPES = {
    "Lora": lambda m: Lora(rank=2),
    "Lora + Checkpointing": lambda m: chain(Lora(rank=2), Checkpointing()),
    "Lora + FusedOps": lambda m: chain(Lora(rank=2), FusedOps()),
    "Lora + Mesa": lambda m: chain(Lora(rank=2), Mesa()),
    "Lora + Velora": lambda m: chain(Lora(rank=2), Velora(groups=8)),
    "Lora + WtaCrs": lambda m: chain(Lora(rank=2), WtaCrs(min_rows=4)),
    "Lora + TokenTune": lambda m: chain(Lora(rank=2), TokenTune(ratio=0.5)),
    "Lora + Reversible": lambda m: chain(Lora(rank=2), Reversible()),
    "Lora + RecurrentMemory": lambda m: chain(Lora(rank=2), RecurrentMemory(tokens=2, segment=4)),
    "Lora + PartialEmbedding": lambda m: chain(Lora(rank=2), PartialEmbedding(ids=models.kept_ids(m), force=True)),
    "LadderSide": lambda m: LadderSide(),
    "Sherl": lambda m: Sherl(reduction=4, late_layers=0),
    "Losa": lambda m: Losa(rank=4),
    "SparseAdapter": lambda m: SparseAdapter(width=96, top_k=8),
}
QUICK = {
    ("bitsandbytes 4-bit", "Lora"),
    ("bitsandbytes 8-bit", "Lora + Reversible"),
    ("bitsandbytes 4-bit", "LadderSide"),
}
QUICK_PEAKS = {("bitsandbytes 8-bit", "Lora + Checkpointing"), ("torchao float8", "Lora")}
GRID = [
    pytest.param(kind, recipe, marks=[] if (kind, recipe) in QUICK else pytest.mark.slow)
    for kind in KINDS
    for recipe in RECIPES
]


def quantised(kind, family="llama"):
    model = models.build(family)
    KINDS[kind](model)
    return model


def dequantised(model, family="llama"):
    """The stock model with the values that the packed weights stand for."""
    import bitsandbytes.functional as functional

    stock = models.build(family)
    state = stock.state_dict()
    for name in hfmodel.block_linears(stock):
        weight = model.get_submodule(name).weight
        if type(weight).__name__ == "Params4bit":
            value = functional.dequantize_4bit(weight.data, weight.quant_state)
        elif type(weight).__name__ == "Int8Params":
            value = functional.int8_vectorwise_dequant(weight.data, weight.SCB)
        else:
            value = weight.dequantize()
        state[f"{name}.weight"].copy_(value.float())
    return stock


def gradients(model, recipe):
    torch.manual_seed(3)
    tightfit.apply(model, recipe)
    torch.manual_seed(4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    model(**models.batch(model)).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def difference(kind, recipe):
    """The largest relative difference of a gradient to that on the dequantised base."""
    packed = quantised(kind)
    plain = dequantised(packed)
    found, wanted = gradients(packed, RECIPES[recipe](packed)), gradients(plain, RECIPES[recipe](plain))
    assert set(found) == set(wanted) and found
    return max(float((found[n] - wanted[n]).norm() / (wanted[n].norm() + 1e-12)) for n in found)


def bound(kind, recipe):
    """Rounding; the step of a code of Mesa that tips over; bitsandbytes rounds inputs where no gradient is wanted."""
    if kind == "bitsandbytes 8-bit" and recipe in ("LadderSide", "Sherl", "Losa"):
        return 0.05
    return 1e-2 if recipe in ("Lora + Mesa", "Sherl") else 1e-4


@pytest.mark.parametrize(("kind", "recipe"), GRID)
def test_gradients_are_those_on_the_dequantised_base(kind, recipe):
    assert difference(kind, recipe) < bound(kind, recipe)


def evaluated(model):
    """The model after a call in evaluation mode, for which some CPUs pack bitsandbytes' 4-bit weights anew."""
    model.eval()
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 4, dtype=torch.long))
    return model.train()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_same_after_an_evaluation(kind):
    model = wide(kind)
    applied = tightfit.apply(model, Lora(rank=2))
    batch = {"input_ids": torch.arange(12).view(2, 6), "labels": torch.arange(12).view(2, 6)}
    found = []
    for _ in range(2):
        model(**batch).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
        evaluated(model)
    assert found[0] and set(found[0]) == set(found[1])
    off = [name for name, grad in found[0].items() if not torch.equal(grad, found[1][name])]
    assert not off, off
    assert not packed_for_inference(applied.remove())


@pytest.mark.skipif(not has_avx512bf16(), reason="bitsandbytes packs for inference on CPUs with AVX512-BF16 only")
def test_a_model_that_was_packed_for_inference_is_refused():
    model = evaluated(wide("bitsandbytes 4-bit"))
    with pytest.raises(tightfit.StateError, match=r"(?s)q_proj.*load the model again"):
        tightfit.apply(model, Lora())
    stock = tightfit.apply(wide("bitsandbytes 4-bit"), Lora()).remove()
    assert packed_for_inference(evaluated(stock)), "what bitsandbytes does is its own matter again"


def saved_bytes(kind, recipe):
    """What packing takes off the weights: of the plan of a recipe, and of the layers themselves."""
    packed, stock = quantised(kind), models.build("llama")
    plans = [tightfit.plan(model, RECIPES[recipe](model), batch=(3, 9)) for model in (stock, packed)]
    layers = [(stock.get_submodule(name), packed.get_submodule(name)) for name in hfmodel.block_linears(stock)]
    real = sum(plain.weight.nbytes - layer_bytes(layer) for plain, layer in layers)
    return plans[0].by_category["weights"] - plans[1].by_category["weights"], real


@pytest.mark.parametrize(("kind", "recipe"), GRID)
def test_a_plan_counts_the_packed_bytes(kind, recipe):
    found, real = saved_bytes(kind, recipe)
    assert real > 30_000 and abs(found - real) <= 0.002 * real  # a planned weight of torchao keeps one element


PEAKS = ["Lora", "Lora + Checkpointing", "LadderSide", "SparseAdapter"]
PEAK_GRID = [
    pytest.param(kind, recipe, marks=[] if (kind, recipe) in QUICK_PEAKS else pytest.mark.slow)
    for kind in KINDS
    for recipe in PEAKS
]


def wide(kind, dtype=torch.float32):
    """A model whose steps are large enough for shares of a per cent to mean something."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=384,
        vocab_size=2000,
        max_position_embeddings=128,
    )
    model = hf.LlamaForCausalLM(config).to(dtype)
    KINDS[kind](model)
    return model


def peaks(kind, recipe, dtype=torch.float32):
    """A planned training step and a real one."""
    model = wide(kind, dtype)
    ids = torch.randint(2000, (4, 64), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, -5:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}
    planned = tightfit.plan(model, RECIPES[recipe](model), batch=batch)
    return planned, planned.verify(model, in_place=True)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize(("kind", "recipe"), PEAK_GRID)
def test_the_planned_peak_is_the_measured_one(kind, recipe, dtype):
    planned, real = peaks(kind, recipe, dtype)
    assert abs(real.peak_error) < 1e-3
    assert planned.by_category["weights"] == pytest.approx(real.measured.by_category["weights"], rel=1e-3)
    assert planned.simulation.phases["optimizer"] == pytest.approx(real.measured.phases["optimizer"], rel=1e-3)


def test_memory_behind_a_packed_weight_is_counted_once():
    """A wrapper's storage has the size of the tensor that it stands for, and no memory."""
    torchao = pytest.importorskip("torchao.quantization")
    layer = nn.Linear(64, 64, bias=False)
    gc.collect()
    before = live_bytes()
    torchao.quantize_(layer, torchao.Int8WeightOnlyConfig())
    gc.collect()
    assert live_bytes() - before == storage_bytes(layer.weight) - 64 * 64 * 4
    assert hfmodel.unique_storage_bytes([layer.weight]) == storage_bytes(layer.weight) < 64 * 64 * 2


def test_torchao_has_no_int4_for_the_cpu():
    """What the page says of it; where this fails, the kind belongs into the table."""
    torchao = pytest.importorskip("torchao.quantization")
    with pytest.raises((ImportError, NotImplementedError, AssertionError)):
        torchao.quantize_(models.build("llama"), torchao.Int4WeightOnlyConfig(group_size=32))


@pytest.mark.parametrize(
    "kind", [k if k == "bitsandbytes 4-bit" else pytest.param(k, marks=pytest.mark.slow) for k in KINDS]
)
@pytest.mark.parametrize("verb", ["merge", "export"])
def test_adapters_are_not_merged_into_packed_weights(kind, verb, tmp_path):
    model = quantised(kind)
    applied = tightfit.apply(model, Lora(rank=2))
    with pytest.raises(
        tightfit.UnsupportedModelError, match=r"packed weight .* save\(\) the adapter, or load the base"
    ):
        applied.merge() if verb == "merge" else applied.export(tmp_path / "out")
    applied.save(tmp_path / "saved")
    again = tightfit.load(quantised(kind), tmp_path / "saved")
    assert again.report()["trainable_parameters"] == applied.report()["trainable_parameters"]


def test_a_plain_model_holds_nothing_packed():
    model = models.build("bert")
    assert not any(map(is_quantised, model.modules()))
    assert all(storage_bytes(p) == p.nbytes for p in model.parameters())


@pytest.mark.slow
def test_the_table():
    rows = []
    for recipe in RECIPES:
        cells = {kind: difference(kind, recipe) for kind in KINDS}
        rows.append({"recipe": recipe, "cells": cells})
    steps = []
    for recipe in PEAKS:
        found = {kind: peaks(kind, recipe) for kind in KINDS}
        cells = {kind: {"planned": p.peak_bytes, "measured": r.peak_bytes} for kind, (p, r) in found.items()}
        steps.append({"recipe": recipe, "cells": cells})
    result = {"model": "Llama, 2 layers", "kinds": list(KINDS), "rows": rows, "peaks": steps}
    if os.environ.get("TIGHTFIT_WRITE_TABLES"):
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    stored = json.loads(RESULT.read_text(encoding="utf-8"))
    assert [r["recipe"] for r in stored["rows"]] == list(RECIPES) and stored["kinds"] == list(KINDS)
    assert [r["recipe"] for r in stored["peaks"]] == PEAKS


def test_the_page_is_up_to_date():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        from tables.quantised import peaks as peak_table
        from tables.quantised import table
    finally:
        sys.path.pop(0)
    page = (ROOT / "docs" / "quantised.md").read_text(encoding="utf-8")
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    assert table(result) in page and peak_table(result) in page


def step_of(model, recipe):
    applied = tightfit.apply(model, recipe)
    model(**models.batch(model)).loss.backward()
    return applied, applied.optimizer(torch.optim.SGD, lr=0.1)


@pytest.mark.parametrize("kind", ["bitsandbytes 4-bit", "torchao int8"])
@pytest.mark.parametrize("recipe", ["none", "FusedOps"])
def test_training_only_what_is_not_packed_is_told(kind, recipe):
    model = quantised(kind)
    recipe = {"none": chain(), "FusedOps": FusedOps()}[recipe]
    message = r"only 7 parameters beside them would: .*embed_tokens\.weight.* add tightfit\.Lora, LadderSide or Sparse"
    assert any(re.search(message, note) for note in tightfit.plan(model, recipe, batch=(2, 8)).notes)
    applied, optimizer = step_of(model, recipe)
    with pytest.warns(
        UserWarning, match=r"^SGD: the 14 packed weights of this quantised LlamaForCausalLM .*" + message
    ):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()  # once is enough
    assert applied.model is model


def frozen_but_norms(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)
    return FusedOps()


def adapters_of_ones_own(model):
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), model)
    return FusedOps()


def an_unpacked_layer(model):
    layer = model.model.layers[1].mlp
    layer.down_proj = nn.Linear(layer.down_proj.in_features, layer.down_proj.out_features, bias=False)
    return FusedOps()


@pytest.mark.parametrize(
    "recipe",
    [
        frozen_but_norms,
        adapters_of_ones_own,
        an_unpacked_layer,
        RECIPES["Lora"],
        RECIPES["Lora + PartialEmbedding"],
        RECIPES["LadderSide"],
    ],
)
def test_nothing_is_told_where_something_was_chosen(recipe):
    model = quantised("bitsandbytes 4-bit")
    applied, optimizer = step_of(model, recipe(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert applied.model is model


def test_a_peft_model_made_afterwards_is_no_reason_to_tell():
    from peft import LoraConfig, get_peft_model

    model = quantised("bitsandbytes 4-bit")
    applied = tightfit.apply(model, FusedOps())
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    wrapped(**models.batch(model)).loss.backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        applied.optimizer(torch.optim.SGD, lr=0.1).step()
