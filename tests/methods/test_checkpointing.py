"""Checkpointing: the model's own gradient checkpointing."""

from __future__ import annotations

import models
import pytest
import torch
from checks.state import gradients

import tightfit
from tightfit import Checkpointing, Lora
from tightfit.core.memory import saved_bytes


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "t5", "bart"])
def test_gradients_are_bit_equal_and_less_is_saved(family):
    stock, model = models.build(family), models.build(family)
    batch = models.batch(stock)
    before = saved_bytes(lambda: model(**batch).loss.backward())
    applied = tightfit.apply(model, Checkpointing())
    assert saved_bytes(lambda: model(**batch).loss.backward()) < 0.7 * before
    (loss, found), (stock_loss, wanted) = gradients(model, batch), gradients(stock, batch)
    assert torch.equal(loss, stock_loss)
    assert set(found) == set(wanted)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-8)
    applied.remove()
    model.zero_grad()
    assert saved_bytes(lambda: model(**batch).loss.backward()) == before


def test_every_block_runs_twice():
    model = models.build("llama")
    runs = []
    model.model.layers[0].input_layernorm.register_forward_hook(lambda *args: runs.append(1))
    tightfit.apply(model, Checkpointing())
    model(**models.batch(model)).loss.backward()
    assert len(runs) == 2


def test_frozen_embeddings_get_no_gradient_work():
    """transformers' switch makes the embeddings' outputs require gradients; non-reentrant checkpointing needs none."""
    model = models.build("bert")
    tightfit.apply(model, [Lora(rank=2), Checkpointing()])
    seen = []
    model.bert.embeddings.register_forward_hook(lambda m, a, out: seen.append(out.requires_grad))
    model(**models.batch(model)).loss.backward()
    assert seen == [False]


def test_hooks_that_were_there_before_stay():
    model = models.build("bert")
    model.enable_input_require_grads()
    hooks = dict(model.bert.embeddings.word_embeddings._forward_hooks)
    kept = model._require_grads_hooks
    applied = tightfit.apply(model, Checkpointing())
    assert dict(model.bert.embeddings.word_embeddings._forward_hooks) == hooks
    assert model._require_grads_hooks is kept
    applied.remove()
    assert dict(model.bert.embeddings.word_embeddings._forward_hooks) == hooks
    model.disable_input_require_grads()
    assert not model.bert.embeddings.word_embeddings._forward_hooks


def test_switched_on_already():
    model = models.build("bert")
    model.activation_checkpointing_enable()
    with pytest.raises(tightfit.StateError, match=r"is on already; call model.\w+_disable\(\) first"):
        tightfit.apply(model, Checkpointing())


def test_a_model_that_does_not_support_it():
    model = torch.nn.Linear(2, 2)
    with pytest.raises(tightfit.UnsupportedModelError, match="Linear does not support gradient checkpointing"):
        tightfit.apply(model, Checkpointing())


def test_offload_is_a_bool():
    with pytest.raises(TypeError, match=r"Checkpointing\(offload=...\): got 'cpu' \(str\), accepted is True or False"):
        Checkpointing(offload="cpu")


def test_offload_copies_nothing_on_the_host():
    model = models.build("bert")
    batch = models.batch(model)
    tightfit.apply(model, Checkpointing(offload=True))
    copies = []
    stock = torch.empty_like

    def watch(tensor, **options):
        if options.get("pin_memory"):
            copies.append(tensor.shape)
        return stock(tensor, **options)

    torch.empty_like = watch
    try:
        model(**batch).loss.backward()
    finally:
        torch.empty_like = stock
    assert not copies


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_offload_keeps_block_inputs_off_the_device():
    def run(offload):
        model = _deep().cuda().train()
        batch = {key: value.cuda() for key, value in models.batch(model, size=8, length=64).items()}
        tightfit.apply(model, Checkpointing(offload=offload))
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        loss = model(**batch).loss
        held = torch.cuda.memory_allocated() - before
        loss.backward()
        return held, [p.grad.cpu() for p in model.parameters()]

    (kept, wanted), (away, found) = run(False), run(True)
    assert away < kept
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b)


def _deep():
    import transformers as hf

    torch.manual_seed(0)
    size = {**models.SIZE, "num_hidden_layers": 12}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**size, vocab_size=models.VOCABULARY))
