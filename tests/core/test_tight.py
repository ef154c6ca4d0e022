"""In-place subclassing: what must survive it, and what reads class names and signatures."""

from __future__ import annotations

import copy
import functools
import inspect
import types

import models
import pytest
import torch
from checks.state import assert_same, logits, snapshot
from torch import nn

import tightfit
from tightfit.core.tight import is_tight, loosen, state_of, tighten


class Plus:
    def forward(self, x):
        return super().forward(x) + state_of(self, Plus)["by"]


class Times:
    def forward(self, x):
        return super().forward(x) * 2


class Called:
    def __call__(self, *args, **kwargs):
        state_of(self, Called)["calls"].append(1)
        return super().__call__(*args, **kwargs)


class Quiet:
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class Inherits(Quiet):
    """Its forward comes from its base."""


def test_mixins_stack_and_come_off_in_any_order():
    layer, x = nn.Linear(2, 2), torch.ones(1, 2)
    stock = layer(x)
    tighten(layer, Plus, {"by": 1.0})
    tighten(layer, Times)
    assert torch.equal(layer(x), (stock + 1) * 2)
    assert type(layer).__name__ == "TightLinear"
    assert isinstance(layer, nn.Linear)
    loosen(layer, Plus)
    assert torch.equal(layer(x), stock * 2)
    loosen(layer, Times)
    assert type(layer) is nn.Linear
    assert not [key for key in vars(layer) if "tight" in key]


def test_the_same_mixin_twice_and_one_that_is_not_there():
    layer = nn.Linear(2, 2)
    tighten(layer, Times)
    with pytest.raises(tightfit.StateError, match="Times is already on this module"):
        tighten(layer, Times)
    with pytest.raises(tightfit.StateError, match="Plus is not on this module"):
        loosen(layer, Plus)


@pytest.mark.parametrize("mixin", [Quiet, Inherits])
def test_an_instance_forward_is_refused(mixin):
    layer = nn.Linear(2, 2)
    layer.forward = layer.forward
    with pytest.raises(tightfit.StateError, match=f"`forward` is set on the instance.*{mixin.__name__} would never be"):
        tighten(layer, mixin)
    tighten(layer, Called, {"calls": []})
    layer(torch.ones(1, 2))
    assert state_of(layer, Called)["calls"] == [1]


def test_a_replaced_class_is_named():
    layer = nn.Linear(2, 2)
    tighten(layer, Times)
    layer.__class__ = nn.Identity
    with pytest.raises(tightfit.StateError, match="replaced after the recipe"):
        loosen(layer, Times)


def test_a_copy_has_its_own_state_and_parameters():
    layer = nn.Linear(2, 2)
    tighten(layer, Plus, {"by": torch.ones(1)})
    twin = copy.deepcopy(layer)
    state_of(twin, Plus)["by"].zero_()
    assert state_of(layer, Plus)["by"] == 1
    assert twin.weight is not layer.weight
    assert is_tight(twin, Plus)
    loosen(twin, Plus)
    assert is_tight(layer, Plus)


@pytest.mark.parametrize("first", ["swap", "parametrise"])
def test_parametrisations_and_swaps(first):
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    layer, x = nn.Linear(2, 2, bias=False), torch.ones(1, 2)
    stock = layer(x)
    if first == "parametrise":
        nn.utils.parametrize.register_parametrization(layer, "weight", Double())
        tighten(layer, Plus, {"by": 1.0})
    else:
        tighten(layer, Plus, {"by": 1.0})
        nn.utils.parametrize.register_parametrization(layer, "weight", Double())
    assert torch.equal(layer(x), 2 * stock + 1)
    loosen(layer, Plus)
    assert torch.equal(layer(x), 2 * stock)
    nn.utils.parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    assert type(layer) is nn.Linear
    assert torch.equal(layer(x), stock)


@pytest.mark.parametrize("family", ["bert", "llama", "t5", "gpt2"])
def test_names_read_from_classes_stay_stock(family):
    model = models.build(family)
    names = {name: type(module).__name__ for name, module in model.named_modules()}
    blocks = [name for stack in tightfit.core.hfmodel.stacks(model) for name in stack]
    _, backbone = tightfit.core.hfmodel.backbone(model)
    for module in {model, backbone, *map(model.get_submodule, blocks)}:
        tighten(module, Quiet)
    assert {name: type(module).__name__ for name, module in model.named_modules()} == names
    # transformers finds the tensors to record under this string
    assert str(type(model)) == str(type(models.build(family)))


def test_consumers_of_class_names_and_signatures():
    from accelerate.utils.dataclasses import get_module_class_from_name
    from transformers.utils import find_labels

    model = models.build("llama")
    tighten(model, Quiet)
    tighten(model.model.layers[0], Quiet)
    tighten(model.model.layers[1], Quiet)
    assert find_labels(type(model)) == ["labels"]
    assert "input_ids" in inspect.signature(model.forward).parameters
    assert issubclass(
        get_module_class_from_name(model, "LlamaDecoderLayer"), type(models.build("llama").model.layers[0])
    )
    assert model._get_name() == "LlamaForCausalLM"


def test_label_smoothing_shifts_labels(tmp_path):
    from transformers import Trainer, TrainingArguments

    def loss(swap):
        model = models.build("llama")
        if swap:
            tighten(model, Quiet)
        arguments = TrainingArguments(output_dir=tmp_path, label_smoothing_factor=0.1, use_cpu=True, report_to="none")
        trainer = Trainer(model=model, args=arguments)
        return trainer.compute_loss(model, models.batch(model))

    assert torch.equal(loss(swap=True), loss(swap=False))


def test_building_from_a_worn_class_gives_a_stock_model(tmp_path):
    model = models.build("bert")
    stock = type(model)
    tighten(model, Quiet)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert type(again) is stock
    assert again.config.architectures == [stock.__name__]
    assert type(type(model)(model.config)) is stock


@pytest.mark.parametrize("family", ["bert", "llama", "t5", "gpt2"])
def test_inner_states_are_still_recorded(family):
    model = models.build(family).eval()
    model.set_attn_implementation("eager")
    batch = models.batch(model)
    wanted = model(**batch, output_hidden_states=True, output_attentions=True)
    for module in list(model.modules()):
        if type(module).__module__.startswith("transformers") and next(module.children(), None) is not None:
            tighten(module, Quiet)
    found = model(**batch, output_hidden_states=True, output_attentions=True)
    kinds = [key for key in wanted if "hidden_states" in key or "attentions" in key]
    assert len(kinds) >= 2
    for key in kinds:
        values = (
            [(a, b) for a, b in zip(found[key], wanted[key])]
            if isinstance(wanted[key], tuple)
            else [(found[key], wanted[key])]
        )
        assert all(torch.equal(a, b) for a, b in values), key


@pytest.mark.parametrize("enable_first", [True, False])
def test_checkpointing_switched_on_before_or_after(enable_first):
    def build(swap):
        model = models.build("bert")
        blocks = list(model.bert.encoder.layer)
        if swap and enable_first:
            model.activation_checkpointing_enable()
        if swap:
            for block in blocks:
                tighten(block, Counts, {"runs": []})
        if not (swap and enable_first):
            model.activation_checkpointing_enable()
        torch.manual_seed(0)
        model(**models.batch(model)).loss.backward()
        return model

    swapped, stock = build(True), build(False)
    for a, b in zip(swapped.parameters(), stock.parameters()):
        assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad)
    # forward runs inside the checkpoint: once forwards and once in the recompute
    assert len(state_of(swapped.bert.encoder.layer[0], Counts)["runs"]) == 2


class Counts:
    def forward(self, *args, **kwargs):
        state_of(self, Counts)["runs"].append(1)
        return super().forward(*args, **kwargs)


def test_an_autocast_wrapper_made_meanwhile_outlives_the_recipe():
    """accelerate's prepare() sets `forward` on the instance, around the class's forward at that time."""
    model = models.build("bert")
    wanted = logits(model, models.batch(model))
    tighten(model, Counts, {"runs": []})
    inner = model.forward.__func__

    @functools.wraps(inner)
    def wrapped(self, *args, **kwargs):
        return inner(self, *args, **kwargs)

    model.forward = types.MethodType(wrapped, model)
    assert torch.equal(logits(model, models.batch(model)), wanted)
    assert state_of(model, Counts)["runs"] == [1]
    loosen(model, Counts)
    assert torch.equal(logits(model, models.batch(model)), wanted)


def test_moves_and_generation():
    model = models.build("llama").eval()
    ids = models.batch(model)["input_ids"][:1]
    wanted = model.generate(ids, max_new_tokens=4, do_sample=False)
    model(ids)
    before = snapshot(model)
    tighten(model, Quiet)
    for layer in model.model.layers:
        tighten(layer, Quiet)
        tighten(layer.mlp.down_proj, Quiet)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), wanted)
    for layer in model.model.layers:
        loosen(layer, Quiet)
        loosen(layer.mlp.down_proj, Quiet)
    loosen(model, Quiet)
    assert_same(before, snapshot(model))
    tighten(model.lm_head, Quiet)
    assert model.to(torch.float64).lm_head.weight.dtype == torch.float64
    assert model.to("meta").lm_head.weight.is_meta


def test_a_compiled_module_uses_the_new_forward():
    layer, x = nn.Linear(2, 2), torch.ones(1, 2)
    stock = layer(x)
    layer.compile(backend="eager")
    tighten(layer, Plus, {"by": 1.0})
    assert torch.equal(layer(x), stock + 1)


def test_functional_call():
    layer, x = nn.Linear(2, 2, bias=False), torch.ones(1, 2)
    tighten(layer, Times)
    out = torch.func.functional_call(layer, {"weight": torch.ones(2, 2)}, (x,))
    assert torch.equal(out, torch.full((1, 2), 4.0))
