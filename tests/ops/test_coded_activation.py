"""Activations that keep a code: decoded a part of the rows at a time, with the results of decoding all."""

import pytest
import torch
from torch import nn

from tightfit.core.memory import allocation_profile, peak_of
from tightfit.ops.activation import activation, gated_activation, slope_of
from tightfit.ops.affine import Affine
from tightfit.ops.affine import torch as affine
from tightfit.ops.dropout import dropout
from tightfit.ops.linear import linear
from tightfit.ops.norm import layer_norm, rms_norm
from tightfit.ops.recompute import recompute

FUNCTIONS = [nn.SiLU(), nn.GELU(), nn.GELU(approximate="tanh")]
SHAPES = [(1, 96), (7, 130), (3, 5, 96), (2, 9, 515), (64,)]


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(affine, "LEAST_PART", 100)


def leaf(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [*SHAPES, (0, 96)])
def test_the_parts_are_the_whole(small_parts, shape, bits):
    codec, x = Affine(bits), leaf(*shape).detach()
    packed = codec.encode(x)
    parts = codec.row_blocks(x.shape)
    assert [rows.start for rows in parts] == [0, *(rows.stop for rows in parts)][: len(parts)]
    found = [codec.decode_rows(packed, rows, x.shape, x.dtype) for rows in parts]
    whole = codec.decode(packed, x.shape, x.dtype).reshape(-1, shape[-1])
    assert torch.equal(torch.cat(found or [whole]), whole)
    wanted = min(affine.PARTS, whole.shape[0])
    assert len(found) == wanted if whole.numel() > 400 else len(found) <= wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_coded_activation_is_that_of_the_decoded_input(small_parts, function, shape, dtype):
    codec, x, w = Affine(), leaf(*shape, dtype=dtype), leaf(3, shape[-1], seed=2, dtype=dtype)
    decoded = codec.decode(codec.encode(x.detach()), x.shape, x.dtype).requires_grad_()
    near = {"rtol": 1e-2 if dtype == torch.bfloat16 else 1e-5, "atol": 1e-5}
    out = linear(activation(x, function, slope_of(function), codec=codec), w)
    assert torch.equal(out, torch.nn.functional.linear(function(x), w))
    pull = torch.randn_like(out)
    (out * pull).sum().backward()
    value = function(decoded)
    value.backward((pull @ w).detach())
    torch.testing.assert_close(x.grad, decoded.grad, **near)
    wanted = pull.reshape(-1, 3).t() @ value.detach().reshape(-1, shape[-1])
    torch.testing.assert_close(w.grad, wanted, **near)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_coded_gate_is_that_of_the_decoded_inputs(small_parts, function, shape, dtype):
    codec, inputs = Affine(), [leaf(*shape, seed=seed, dtype=dtype) for seed in (1, 2)]
    w = leaf(3, shape[-1], seed=3, dtype=dtype)
    gate, up = (codec.decode(codec.encode(t.detach()), t.shape, t.dtype).requires_grad_() for t in inputs)
    near = dict.fromkeys(("rtol", "atol"), 2e-2 if dtype == torch.bfloat16 else 1e-5)
    out = linear(gated_activation(*inputs, function, slope_of(function), codec=codec), w)
    assert torch.equal(out, torch.nn.functional.linear(function(inputs[0]) * inputs[1], w))
    pull = torch.randn_like(out)
    (out * pull).sum().backward()
    value = function(gate) * up
    value.backward((pull @ w).detach())
    torch.testing.assert_close(inputs[0].grad, gate.grad, **near)
    torch.testing.assert_close(inputs[1].grad, up.grad, **near)
    wanted = pull.reshape(-1, 3).t() @ value.detach().reshape(-1, shape[-1])
    torch.testing.assert_close(w.grad, wanted, **near)


def test_gates_of_two_types_are_decoded_whole(small_parts):
    gate, up = leaf(9, 96), leaf(9, 96, seed=2, dtype=torch.float64)
    out = gated_activation(gate, up, nn.SiLU(), slope_of(nn.SiLU()), codec=Affine())
    assert out.dtype == torch.float64
    out.sum().backward()
    stock = [t.detach().requires_grad_() for t in (gate, up)]
    (nn.functional.silu(stock[0]) * stock[1]).sum().backward()
    torch.testing.assert_close(gate.grad, stock[0].grad, rtol=0, atol=0.05)
    torch.testing.assert_close(up.grad, stock[1].grad, rtol=0, atol=0.05)


def test_a_gradient_that_is_no_run_of_memory(small_parts):
    x, again = leaf(8, 96), leaf(8, 96)
    for given, codec in ((x, Affine()), (again, Affine())):
        out = activation(given, nn.GELU(), slope_of(nn.GELU()), codec=codec)
        pull = leaf(96, 8, seed=5).detach().t()
        out.backward(pull if given is x else pull.contiguous())
    assert torch.equal(x.grad, again.grad)


@pytest.mark.parametrize("gated", [False, True])
def test_backward_takes_its_gradients_and_a_part_of_the_inputs(gated):
    rows, width = 512, 2048
    x, up = leaf(rows, width), leaf(rows, width, seed=2)
    one = x.nbytes
    slope = slope_of(nn.GELU())
    out = (
        gated_activation(x, up, nn.GELU(), slope, codec=Affine())
        if gated
        else activation(x, nn.GELU(), slope, codec=Affine())
    )
    pull = torch.ones_like(out)
    wanted = 2 if gated else 1
    with allocation_profile() as profiler:
        grads = torch.autograd.grad(out, [x, up] if gated else x, pull)
    found = peak_of(profiler)
    assert len(grads) == wanted
    assert wanted * one < found <= (wanted + wanted / affine.PARTS + 0.05) * one


class _Stopped(torch.autograd.Function):
    """Hands no gradient on."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@pytest.mark.parametrize("operator", ["activation", "gate", "layer norm", "rms norm", "dropout", "recompute"])
def test_where_no_gradient_comes_none_goes_on(operator):
    x, w = leaf(4, 96), leaf(96, seed=2)
    codec = Affine()
    out = {
        "activation": lambda: activation(x, nn.GELU(), slope_of(nn.GELU()), codec=codec),
        "gate": lambda: gated_activation(x, x, nn.GELU(), slope_of(nn.GELU()), codec=codec),
        "layer norm": lambda: layer_norm(x, (96,), w, None, 1e-5, codec=codec),
        "rms norm": lambda: rms_norm(x, w, 1e-5, lambda t: t * w, codec=codec),
        "dropout": lambda: dropout(x, 0.5),
        "recompute": lambda: recompute(torch.sin, x, codec=codec),
    }[operator]()
    _Stopped.apply(out).sum().backward()
    assert x.grad is None and w.grad is None


def counted(codec, monkeypatch):
    calls = []
    decode = codec.decode
    monkeypatch.setattr(codec, "decode", lambda *given: calls.append(1) or decode(*given))
    return calls


@pytest.mark.parametrize("kind", ["layer norm", "rms norm"])
def test_a_norms_code_is_decoded_once_for_all(kind, monkeypatch):
    codec, x, w = Affine(), leaf(6, 96), leaf(96, seed=2)
    layers = [leaf(3, 96, seed=seed) for seed in (3, 4)]

    def run():
        norm = layer_norm(x, (96,), w, None, 1e-5, codec=codec)
        if kind == "rms norm":
            norm = rms_norm(x, w, 1e-5, lambda t: t * torch.rsqrt(t.square().mean(-1, True) + 1e-5) * w, codec=codec)
        return sum(linear(norm, layer).sum() for layer in layers)

    calls = counted(codec, monkeypatch)
    loss = run()
    first = torch.autograd.grad(loss, [x, w, *layers], retain_graph=True)
    assert len(calls) == 1
    # a graph that is gone through again has nothing left to share, and the same gradients
    second = torch.autograd.grad(loss, [x, w, *layers])
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    # a graph that is left after the layers' part holds nothing for the norm that is never asked
    calls.clear()
    torch.autograd.grad(run(), layers)
    assert len(calls) == 1


def test_a_norm_without_layers_behind_decodes_for_itself(monkeypatch):
    codec, x, w = Affine(), leaf(6, 96), leaf(96, seed=2)
    calls = counted(codec, monkeypatch)
    layer_norm(x, (96,), w, None, 1e-5, codec=codec).square().sum().backward()
    assert len(calls) == 1 and x.grad is not None
