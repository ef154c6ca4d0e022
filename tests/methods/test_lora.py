"""Lora: a thin front to PEFT."""

from __future__ import annotations

import models
import peft
import pytest
import torch
import transformers as hf
from checks.state import assert_same, logits, snapshot, train
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

import tightfit
from tightfit import Lora
from tightfit.core import hfmodel


def adapted(model):
    return [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "t5", "bart"])
def test_the_default_is_every_linear_layer_of_the_blocks(family):
    model = models.build(family)
    names = hfmodel.block_linears(model)
    tightfit.apply(model, Lora(rank=2))
    assert adapted(model) == names
    head = model.get_output_embeddings()
    assert head is None or not isinstance(head, BaseTunerLayer)


def _jamba():
    mamba = {"mamba_d_state": 4, "mamba_dt_rank": 4}
    layers = {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "num_key_value_heads": 1}
    return hf.JambaForCausalLM(hf.JambaConfig(**models.SIZE, **mamba, **layers, vocab_size=models.VOCABULARY))


def _mamba():
    config = hf.MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4, vocab_size=models.VOCABULARY)
    return hf.MambaForCausalLM(config)


def _llama4():
    heads = {"num_key_value_heads": 1, "head_dim": 16, "intermediate_size_mlp": 32, "num_local_experts": 2}
    config = hf.Llama4TextConfig(**models.SIZE, **heads, vocab_size=models.VOCABULARY, interleave_moe_layer_step=1)
    return hf.Llama4ForCausalLM(config)


@pytest.mark.parametrize(
    ("build", "left"),
    [(_jamba, {"dt_proj"}), (_mamba, {"x_proj", "dt_proj", "out_proj"}), (_llama4, {"router"})],
)
def test_adapters_stand_only_where_they_take_part(build, left):
    torch.manual_seed(0)
    model = build().train()
    linears = hfmodel.block_linears(model)
    tightfit.apply(model, Lora(rank=2))
    assert {name.rsplit(".", 1)[1] for name in set(linears) - set(adapted(model))} == left
    ids = torch.randint(1, models.VOCABULARY, (2, 6))
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_where():
    model = models.build("bert")
    applied = tightfit.apply(model, Lora(rank=3, where="query|*.1.*.value"))
    assert len(adapted(model)) == 3
    shapes = {tuple(p.shape) for n, p in model.named_parameters() if "lora_A" in n}
    assert shapes == {(3, 32)}
    applied.remove()
    with pytest.raises(tightfit.SelectorError, match=r"Lora: where='qeury'.*did you mean 'query'"):
        tightfit.apply(model, Lora(where="qeury"))


@pytest.mark.parametrize(("train_head", "frozen_before"), [(True, False), (False, False), (True, True)])
def test_a_classifier_stays_as_trainable_as_it_was(train_head, frozen_before):
    model = models.build("bert")
    model.classifier.requires_grad_(not frozen_before)
    applied = tightfit.apply(model, Lora(rank=2, train_head=train_head))
    assert model.classifier.weight.requires_grad == (train_head and not frozen_before)
    assert not model.bert.embeddings.word_embeddings.weight.requires_grad
    assert all(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)
    applied.remove()
    assert model.classifier.weight.requires_grad != frozen_before


def test_a_head_that_gets_an_adapter_is_frozen_underneath():
    model = models.build("bert")
    tightfit.apply(model, Lora(rank=2, where="query|classifier"))
    assert not model.classifier.base_layer.weight.requires_grad


def test_it_is_pefts_own_training():
    """The same numbers as get_peft_model with the same seed."""
    batch = models.batch(models.build("llama"))
    ours, theirs = models.build("llama"), models.build("llama")
    names = hfmodel.block_linears(theirs)
    torch.manual_seed(3)
    applied = tightfit.apply(ours, Lora(rank=4, alpha=8, dropout=0.1))
    torch.manual_seed(3)
    wrapped = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=names))
    trainable = [p for p in wrapped.parameters() if p.requires_grad]
    torch.manual_seed(4)
    found = train(ours, applied.optimizer(lr=1e-2), batch, 3)
    torch.manual_seed(4)
    assert found == train(wrapped, torch.optim.AdamW(trainable, lr=1e-2), batch, 3)
    merged, wanted = applied.merge().state_dict(), wrapped.merge_and_unload().state_dict()
    assert list(merged) == list(wanted)
    assert all(torch.equal(merged[key], wanted[key]) for key in wanted)


CONFIGS = {
    "ia3": peft.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": peft.LoHaConfig(r=2, target_modules=["q_proj"]),
    "oft": peft.OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj"]),
    "boft": peft.BOFTConfig(boft_block_size=8, target_modules=["q_proj"]),
    "norms": peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "head": peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "biases": peft.LoraConfig(r=2, target_modules=["q_proj"], bias="lora_only"),
    "embedding": peft.LoraConfig(r=2, target_modules=["embed_tokens", "v_proj"]),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_other_kinds_of_adapters(kind, tmp_path):
    model = models.build("llama")
    before = snapshot(model)
    recipe = tightfit.chain(Lora(config=CONFIGS[kind]))
    assert tightfit.Recipe.from_json(recipe.to_json()) == recipe
    with tightfit.apply(model, recipe):
        pass
    assert_same(before, snapshot(model))
    applied = tightfit.apply(model, recipe)
    batch = models.batch(model)
    train(model, applied.optimizer(lr=1e-1), batch, 2)
    live = logits(model, batch)
    applied.export(tmp_path / "out")
    applied.save(tmp_path)
    again = models.build("llama")
    tightfit.load(again, tmp_path)
    assert torch.equal(logits(again, batch), live)
    merged = applied.merge()
    assert [n for n, _ in merged.named_parameters()] == list(before["flags"])
    torch.testing.assert_close(logits(merged, batch), live, rtol=1e-3, atol=1e-4)
    assert not torch.equal(logits(merged, batch), logits(models.build("llama"), batch))
    exported = type(merged).from_pretrained(tmp_path / "out")
    assert torch.equal(logits(exported, batch), logits(merged, batch))


@pytest.mark.parametrize("config", [CONFIGS["loha"], peft.LoKrConfig(r=2, target_modules=["q_proj"])])
def test_adapters_that_may_be_left_out_at_random_are_planned(config):
    model = models.build("llama")
    found = tightfit.plan(model, Lora(config=config), batch=(2, 8)).verify()
    assert abs(found.peak_error) < 1e-3


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_config_and_its_dict_are_one_value(kind):
    config = CONFIGS[kind]
    recipe = tightfit.chain(Lora(config=config))
    assert recipe == tightfit.chain(Lora(config=config.to_dict()))
    assert recipe == tightfit.Recipe.from_json(recipe.to_json())
    assert "peft_version" not in repr(recipe)


def qwen2():
    """A decoder whose first projections have a bias and whose last one has none."""
    size = {**models.SIZE, "vocab_size": models.VOCABULARY, "num_key_value_heads": 1, "pad_token_id": 0}
    return models._seeded(lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**size)), None)


TIED = {
    "head": Lora(where="lm_head|q_proj"),
    "embedding": Lora(config={"peft_type": "LORA", "target_modules": ["q_proj", "embed_tokens"]}),
    "copies": Lora(config={"peft_type": "LORA", "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
}


def trained_logits(model, applied):
    """(batch, logits) after two steps."""
    batch = models.batch(model)
    train(model, applied.optimizer(lr=1e-1), batch, 2)
    return batch, logits(model, batch)


@pytest.mark.parametrize("kind", TIED)
def test_a_tied_weight_that_an_adapter_changes_in_one_place_is_exported_and_not_merged(kind, tmp_path):
    model = models.build("llama-tied")
    applied = tightfit.apply(model, TIED[kind])
    batch, live = trained_logits(model, applied)
    with pytest.raises(tightfit.StateError, match=r"(lm_head|embed_tokens).weight is tied to .* use export"):
        applied.merge()
    assert torch.equal(logits(model, batch), live)
    applied.export(tmp_path / "out")
    torch.testing.assert_close(logits(type(model).from_pretrained(tmp_path / "out"), batch), live)


@pytest.mark.parametrize(
    "places", [{"modules_to_save": ["embed_tokens"]}, {"target_modules": ["q_proj", "embed_tokens"]}]
)
def test_tied_adapters_on_tied_weights_are_merged_once(places, tmp_path):
    config = {"peft_type": "LORA", "target_modules": ["q_proj"], "ensure_weight_tying": True, **places}
    model = models.build("llama-tied")
    applied = tightfit.apply(model, Lora(config=config))
    batch, live = trained_logits(model, applied)
    applied.export(tmp_path / "out")
    merged = logits(applied.merge(), batch)
    torch.testing.assert_close(merged, live, rtol=1e-4, atol=1e-4)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "out"), batch), merged)


@pytest.mark.parametrize("leave", ["remove", "merge"])
def test_modules_that_were_put_there_since_stay(leave):
    model = models.build("llama")
    applied = tightfit.apply(model, Lora(rank=2))
    model.resize_token_embeddings(models.VOCABULARY + 10, mean_resizing=False)
    table, head, inner = model.get_input_embeddings(), model.lm_head, model.model.layers[0].mlp.up_proj.base_layer
    getattr(applied, leave)()
    assert (model.get_input_embeddings(), model.lm_head) == (table, head)
    assert model.model.layers[0].mlp.up_proj is inner
    assert model(input_ids=torch.tensor([[models.VOCABULARY + 9]])).logits.shape[-1] == models.VOCABULARY + 10
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_merge_that_one_adapter_refuses_leaves_the_others(tmp_path):
    model = qwen2()
    config = {"peft_type": "LORA", "target_modules": ["q_proj", "o_proj"], "lora_bias": True}
    applied = tightfit.apply(model, Lora(config=config))
    batch, live = trained_logits(model, applied)
    with pytest.raises(tightfit.StateError, match=r"the adapter of .*o_proj cannot be merged .*lora_bias"):
        applied.merge()
    with pytest.raises(tightfit.StateError, match=r"export\(\): the adapter of .*o_proj cannot be merged .*lora_bias"):
        applied.export(tmp_path / "out")
    assert torch.equal(logits(model, batch), live) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fields", "kind", "said"),
    [
        ({"rank": 0}, ValueError, r"Lora\(rank=...\): got 0, accepted is an int >= 1"),
        ({"rank": 2.0}, TypeError, r"Lora\(rank=...\): got 2.0 \(float\)"),
        ({"alpha": 0}, ValueError, r"Lora\(alpha=...\): got 0, accepted is a number in \(0"),
        ({"dropout": 1.0}, ValueError, r"Lora\(dropout=...\): got 1.0, accepted is a number in \[0, 1\)"),
        ({"where": "a||b"}, ValueError, r"Lora\(where=...\)"),
        ({"train_head": 1}, TypeError, r"Lora\(train_head=...\)"),
        ({"config": 3}, TypeError, r"Lora\(config=...\): got 3, accepted is a peft config"),
        ({"config": {"r": 2}}, ValueError, r"has no 'peft_type'"),
        ({"config": {"peft_type": "LORE"}}, ValueError, r"unknown peft_type 'LORE'; did you mean 'LORA'"),
        ({"config": {"peft_type": "LORA", "rr": 2}}, ValueError, r"LORA has no field 'rr'; did you mean 'r'"),
        ({"config": {"peft_type": "PREFIX_TUNING"}}, ValueError, r"PREFIX_TUNING does not put adapters into layers"),
        (
            {"config": peft.AdaLoraConfig(total_step=10)},
            ValueError,
            r"ADALORA .* shares out its ranks .*get_peft_model",
        ),
        ({"config": {"peft_type": "SHIRA"}}, ValueError, r"SHIRA .* keeps them in no tensor of the model"),
        (
            {"config": {"peft_type": "LORA", "trainable_token_indices": [1]}},
            ValueError,
            r"trainable_token_indices changes parameters",
        ),
        ({"config": {"peft_type": "LORA"}, "rank": 4}, ValueError, r"Lora\(rank=..., config=...\): give either"),
    ],
)
def test_bad_fields(fields, kind, said):
    with pytest.raises(kind, match=said):
        Lora(**fields)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora"])
def test_adapters_that_begin_with_a_part_of_the_weights(start, tmp_path):
    model = models.build("llama").eval()
    recipe = Lora(config=peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=start))
    batch = models.batch(model)
    before, told = snapshot(model), logits(model, batch)
    planned = tightfit.plan(model, recipe, batch=(2, 8))
    copied = sum(p.nbytes for name, p in model.named_parameters() if "q_proj" in name or "down_proj" in name)
    assert planned.by_category["host"] == copied
    assert abs(planned.verify().peak_error) < 1e-3
    assert_same(before, snapshot(model))
    applied = tightfit.apply(model, recipe)
    torch.testing.assert_close(logits(model, batch), told, rtol=1e-4, atol=1e-4)
    train(model, applied.optimizer(torch.optim.SGD, lr=0.1), batch, 2)
    applied.remove()
    assert_same(before, snapshot(model))
    applied = tightfit.apply(model, recipe)
    train(model, applied.optimizer(torch.optim.SGD, lr=0.1), batch, 2)
    trained = logits(model, batch)
    assert not torch.allclose(trained, told, rtol=1e-4, atol=1e-4)
    applied.save(tmp_path)
    again = models.build("llama").eval()
    state = torch.manual_seed(5).get_state()  # a later session has other random numbers
    tightfit.load(again, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(logits(again, batch), trained)
    torch.testing.assert_close(logits(applied.merge(), batch), trained, rtol=1e-4, atol=1e-4)


def test_a_model_with_adapters_is_refused():
    model = models.build("bert")
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query"]))
    with pytest.raises(tightfit.StateError, match=r"already carries PEFT adapters \(at bert.encoder.layer.0"):
        tightfit.apply(model, Lora())


def test_a_model_without_blocks_is_refused():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

    with pytest.raises(tightfit.UnsupportedModelError, match=r"Plain has no stack of blocks.*where="):
        tightfit.apply(Plain(), Lora())
    tightfit.apply(Plain(), Lora(rank=1, where="layer"))


@pytest.mark.parametrize("verb", ["merge", "export"])
def test_packed_weights_are_not_merged_into(verb, tmp_path):
    """Quantised layers hold integers; a stand-in for one here."""
    model = models.build("bert")
    applied = tightfit.apply(model, Lora(rank=2, where="query"))
    layer = model.bert.encoder.layer[0].attention.self.query.base_layer
    stock = layer.weight
    layer.weight = nn.Parameter(stock.to(torch.int8), requires_grad=False)
    call = applied.merge if verb == "merge" else lambda: applied.export(tmp_path / "out")
    with pytest.raises(
        tightfit.UnsupportedModelError, match=rf"{verb}: bert.*query holds a packed weight \(torch.int8"
    ):
        call()
    assert adapted(model)  # still applied
    layer.weight = stock
    applied.remove()


def test_an_export_leaves_the_live_adapters_alone(tmp_path):
    model = models.build("bert")
    applied = tightfit.apply(model, Lora(config={"peft_type": "LORA", "use_dora": True, "target_modules": ["query"]}))
    before = snapshot(model)
    applied.stock_state_dict()
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("kind", [None, "ia3", "embedding"])
def test_adapters_on_a_model_in_float64(kind, tmp_path):
    model = models.build("llama").double()
    recipe = Lora(config=CONFIGS[kind]) if kind else Lora(rank=2)
    found = tightfit.plan(model, recipe, batch=(2, 8)).verify()
    assert abs(found.peak_error) < 1e-3
    applied = tightfit.apply(model, recipe)
    batch = models.batch(model)
    train(model, applied.optimizer(lr=1e-2), batch, 2)
    applied.save(tmp_path)
    again = models.build("llama").double()
    tightfit.load(again, tmp_path)
    assert torch.equal(logits(again, batch), logits(model, batch))
