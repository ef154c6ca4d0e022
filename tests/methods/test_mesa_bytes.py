"""Mesa keeps exactly the bytes that its codes take, and plans say so."""

import functools
import gc

import pytest
import torch
from mesa_cases import (
    batch_of,
    build,
    gradient_error,
    kept_bytes,
    twin,
    wide,
)
from torch import nn

import tightfit
from tightfit import FusedOps, Mesa
from tightfit.core.memory import allocator_peak, live_bytes
from tightfit.core.simulate import example_batch, simulate
from tightfit.ops.affine import Affine
from tightfit.ops.linear import linear

# -- what is kept -------------------------------------------------------------------------------------------------


@functools.cache
def block_bytes(family, *recipe):
    """Saved bytes of one block: those of a model of two less those of one of one."""
    found = []
    for layers in (2, 1):
        model = wide(family, layers)
        tightfit.apply(model, list(recipe))
        batch = example_batch(model, 4, 16, padded=False)
        found.append(kept_bytes(lambda m=model, b=batch: m(**b).loss.backward()))
    return found[0] - found[1]


ROWS, D, FF, KV = 64, 256, 640, 128
F32 = torch.float32


@pytest.mark.parametrize("bits", [8, pytest.param(4, marks=pytest.mark.slow)])
def test_a_block_keeps_what_its_codes_take_bert(bits):
    code = Affine(bits).nbytes
    norms = 2 * (code((ROWS, D), F32) + 4 * ROWS)  # a row's scale
    rest = norms + code((ROWS, FF), F32)
    attention = 3 * code((ROWS, D), F32)
    recipe = [FusedOps(), Mesa(bits=bits, attention=True)]
    assert block_bytes("bert", *recipe) == rest + attention
    assert block_bytes("bert", FusedOps(), Mesa(bits=bits)) == rest + 3 * ROWS * D * 4
    mixed = Mesa(bits=bits, mlp_bits=4, attention=True)
    mlp = Affine(4).nbytes((ROWS, FF), F32)
    assert block_bytes("bert", mixed) == norms + mlp + attention


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
def test_a_block_keeps_what_its_codes_take_llama(bits):
    code = Affine(bits).nbytes
    rest = 2 * (code((ROWS, D), F32) + 4 * ROWS) + 2 * code((ROWS, FF), F32)
    attention = code((ROWS, D), F32) + 2 * code((ROWS, KV), F32)
    assert block_bytes("llama", FusedOps(), Mesa(bits=bits, attention=True)) == rest + attention
    assert block_bytes("llama", Mesa(bits=bits, attention=True)) == rest + attention
    assert block_bytes("llama", FusedOps(), Mesa(bits=bits)) == rest + ROWS * (D + 2 * KV) * 4


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_saved_ratios(family):
    stock, mesa = block_bytes(family), block_bytes(family, FusedOps(), Mesa(attention=True))
    assert stock / mesa > {"bert": 5.5, "llama": 7.0}[family]


def test_siblings_share_one_code_where_the_norm_is_stock():
    stock = block_bytes("bert")
    coded = block_bytes("bert", Mesa(where="query|key|value"))
    assert coded - stock == Affine().nbytes((ROWS, D), F32) - ROWS * D * 4


def test_siblings_share_one_code_without_any_source():
    x = torch.randn(10, 128)
    weights = nn.ParameterList(torch.randn(64, 128) for _ in range(3))
    codecs = [Affine(), Affine(), Affine(4)]  # the third reads what the first kept

    def step():
        sum(linear(x, w, codec=c).sum() for w, c in zip(weights, codecs)).backward()

    assert kept_bytes(step) == Affine().nbytes(x.shape, F32)
    y = x.clone()

    def written_to():
        first = linear(y, weights[0], codec=codecs[0])
        y.add_(1)  # the code of the old values serves no more
        (first.sum() + linear(y, weights[1], codec=codecs[0]).sum()).backward()

    assert kept_bytes(written_to) == 2 * Affine().nbytes(x.shape, F32)


@pytest.mark.parametrize(
    ("family", "rounding"),
    [
        ("bert", "stochastic"),
        ("llama", "nearest"),
        *(pytest.param(family, "nearest", marks=pytest.mark.slow) for family in ("bert", "gpt2", "t5 gated", "vit")),
    ],
)
def test_planned_bytes_are_kept_bytes(family, rounding):
    model = twin(build(family), FusedOps(), Mesa(attention=True, rounding=rounding))
    batch = batch_of(model)
    assert simulate(model, batch).saved_bytes == kept_bytes(lambda: model(**batch).loss.backward())


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param((Mesa(),), id="alone", marks=pytest.mark.slow),
        pytest.param((FusedOps(), Mesa(attention=True, mlp_bits=4)), id="fused"),
    ],
)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_planned_peaks_are_those_of_the_allocator(family, recipe):
    gc.collect()
    others = live_bytes()
    model = wide(family, 2)
    batch = example_batch(model, 32, 64)
    planned = tightfit.plan(model, list(recipe), batch=batch, optimizer="sgd").peak_bytes
    assert planned > 5 * sum(p.nbytes for p in model.parameters())  # activations decide it
    tightfit.apply(model, list(recipe))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def step():
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    assert planned == pytest.approx(allocator_peak(step) - others, rel=1e-4)


def test_nothing_is_kept_without_gradients_nor_changed_in_evaluation():
    stock = build("bert")
    batch = batch_of(stock)
    with torch.no_grad():
        with_attention = twin(stock, Mesa(attention=True))
        assert kept_bytes(lambda: with_attention(**batch)) == 0
    coded = twin(stock, Mesa())
    stock.eval()
    coded.eval()
    assert gradient_error(stock, coded, batch) < 1e-5  # codes are for training
    assert torch.equal(stock(**batch).logits, coded(**batch).logits)


def test_frozen_weights_keep_no_code():
    x, w = torch.randn(10, 128, requires_grad=True), nn.Parameter(torch.randn(64, 128), requires_grad=False)
    held = nn.ParameterList([w])
    assert kept_bytes(lambda: linear(x, held[0], codec=Affine()).sum().backward()) == 0
    stock = wide("bert", 2)
    for parameter in stock.parameters():
        parameter.requires_grad_(False)
    coded, batch = twin(stock, Mesa()), batch_of(stock)
    assert kept_bytes(lambda: coded(**batch)) == 0
