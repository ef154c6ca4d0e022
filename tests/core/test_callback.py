"""The Trainer side of a recipe, and models that carry adapters of the user's own."""

from __future__ import annotations

import models
import peft
import pytest
import torch
from checks import transforms
from checks.state import assert_same, gradients, snapshot
from transformers import TrainerCallback, TrainerControl

import tightfit
from tightfit import Checkpointing, Lora, PartialEmbedding
from tightfit.core.callback import EVENTS


class Listens(TrainerCallback):
    def __init__(self):
        self.heard = []

    def on_step_end(self, args, state, control, **kwargs):
        self.heard.append(kwargs["note"])
        control.should_save = True

    def on_train_begin(self, args, state, control, **kwargs):
        self.heard.append("begin")


def test_events_reach_the_parts(monkeypatch):
    listener = Listens()
    monkeypatch.setattr(transforms.Counter, "callback", lambda self: listener)
    model = models.build("bert")
    callback = tightfit.apply(model, transforms.CountCalls()).callback()
    control = TrainerControl()
    assert callback.on_step_end(None, None, control, note=3) is control
    assert control.should_save
    callback.on_train_begin(None, None, control, optimizer=None)
    assert listener.heard == [3, "begin"]
    for event in EVENTS:
        if event not in ("on_step_end", "on_train_begin"):
            getattr(callback, event)(None, None, control, metrics={})


def test_it_hands_over_the_optimizer_behind_a_wrapper():
    model = models.build("bert")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recipe = PartialEmbedding(ids=models.kept_ids(model), force=True)
    callback = tightfit.apply(model, recipe).callback()

    class Wrapped:
        def __init__(self):
            self.optimizer = optimizer

    callback.on_train_begin(None, None, TrainerControl(), optimizer=Wrapped())
    own = {id(p) for p in model.parameters()}
    assert all(id(p) in own for p in optimizer.param_groups[0]["params"])


def test_it_is_for_its_own_model():
    model = models.build("bert")
    callback = tightfit.apply(model, Checkpointing()).callback()
    callback.on_train_begin(None, None, TrainerControl(), model=torch.nn.Sequential(model))
    with pytest.raises(tightfit.StateError, match=r"another BertForSequenceClassification than .*\(model_init makes"):
        callback.on_train_begin(None, None, TrainerControl(), model=models.build("bert"))


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_model_with_the_users_own_adapters(family):
    stock, model = models.build(family), models.build(family)
    names, batch = tightfit.core.hfmodel.block_linears(stock), models.batch(stock)

    def wrap(base):
        torch.manual_seed(0)
        return peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=names))

    stock, model = wrap(stock), wrap(model)
    wanted = gradients(stock, batch)
    model(**batch)  # some models complete their config in the first forward
    before = snapshot(model)
    recipe = [
        transforms.OwnLinear(),
        transforms.CountCalls(),
        Checkpointing(),
        PartialEmbedding(ids=models.kept_ids(model), force=True),
    ]
    applied = tightfit.apply(model, recipe)
    torch.testing.assert_close(gradients(model, batch), wanted, rtol=1e-4, atol=1e-6)
    applied.remove()
    model.zero_grad()
    assert_same(before, snapshot(model))
    with pytest.raises(tightfit.StateError, match="already carries PEFT adapters"):
        tightfit.apply(model, Lora())
