"""Mesa where steps are repeated, recomputed, accumulated, copied and undone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from checks.state import gradients
from mesa_cases import (
    WITHOUT_DROPOUT,
    assert_equal_gradients,
    batch_of,
    build,
    gradient_error,
    twin,
)

import tightfit
from tightfit import Checkpointing, FusedOps, Lora, Mesa
from tightfit.ops.affine import Affine
from tightfit.ops.linear import linear

# -- again and again ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_the_same_seed_gives_the_same_gradients(rounding):
    model = twin(build("bert"), Mesa(attention=True, rounding=rounding))
    batch = batch_of(model)
    assert_equal_gradients(gradients(model, batch)[1], gradients(model, batch)[1], rtol=0, atol=0)


@pytest.mark.parametrize("recipe", [(), (FusedOps(),), (Lora(rank=4),)], ids=["alone", "fused", "lora"])
def test_recomputed_blocks_give_the_same_gradients(recipe):
    stock = build("llama")
    plain = twin(stock, *recipe, Mesa(attention=True))
    again = twin(stock, *recipe, Mesa(attention=True), Checkpointing())
    batch = batch_of(stock)
    assert_equal_gradients(gradients(again, batch)[1], gradients(plain, batch)[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("offload", [False, True])
def test_checkpointing_of_blocks_that_begin_with_a_linear(offload):
    # such a block keeps its input's own code, not the one of the norm before it
    stock = build("bert")
    coded = twin(stock, FusedOps(), Mesa(attention=True), Checkpointing(offload=offload))
    assert 1e-5 < gradient_error(stock, coded, batch_of(stock, size=8)) < 0.02


def test_accumulated_gradients_add_up():
    model = twin(build("bert", table=WITHOUT_DROPOUT), Mesa())
    batches = [batch_of(model, seed=s, length=6 + s) for s in (1, 2)]
    one, two = (gradients(model, b)[1] for b in batches)
    both = gradients(model, *batches)[1]
    assert_equal_gradients(both, {n: one[n] + two[n] for n in one}, rtol=1e-5, atol=1e-7)
    model.zero_grad()
    sum(model(**b).loss for b in batches).backward()  # called twice before the backward
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_equal_gradients(found, both, rtol=1e-4, atol=1e-6)


def test_a_layer_that_is_called_twice():
    x, y, w = (torch.randn(*s, requires_grad=True) for s in ((12, 128), (12, 96), (96, 128)))
    codec = Affine()
    out = linear(torch.tanh(linear(x, w, codec=codec) + y) @ w.detach(), w, codec=codec)
    (grad,) = torch.autograd.grad(out.square().sum(), w)
    stock = F.linear(torch.tanh(F.linear(x, w) + y) @ w.detach(), w)
    (wanted,) = torch.autograd.grad(stock.square().sum(), w)
    assert torch.equal(out, stock)
    assert 0 < (grad - wanted).norm() / wanted.norm() < 0.02


def test_a_deepcopy_works_alone():
    model = twin(build("bert"), FusedOps(), Mesa(attention=True))
    copied, batch = copy.deepcopy(model), batch_of(model)
    wanted = gradients(model, batch)[1]
    del model
    assert_equal_gradients(gradients(copied, batch)[1], wanted, rtol=0, atol=0)


def test_a_kept_graph_gives_the_same_gradients_twice():
    model = twin(build("llama"), Mesa(attention=True))
    loss, parameters = model(**batch_of(model)).loss, list(model.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    second = torch.autograd.grad(loss, parameters)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_hooks_on_what_is_kept():
    model = twin(build("bert"), FusedOps(), Mesa(attention=True))
    batch = batch_of(model)
    wanted = gradients(model, batch)[1]
    with torch.autograd.graph.save_on_cpu():
        assert_equal_gradients(gradients(model, batch)[1], wanted, rtol=0, atol=0)


def test_removal_restores_stock():
    model = build("bert")
    batch, classes = batch_of(model), [type(m) for m in model.modules()]
    wanted = gradients(model, batch)[1]
    applied = tightfit.apply(model, Mesa(attention=True))
    assert model.config._attn_implementation == "tightfit_sdpa_8_128_nearest"
    applied.remove()
    assert model.config._attn_implementation == "sdpa" and [type(m) for m in model.modules()] == classes
    assert_equal_gradients(gradients(model, batch)[1], wanted, rtol=0, atol=0)
