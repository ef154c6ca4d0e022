# ruff: noqa: F401, F811 (fixtures are imported)
"""Gated activations and stepped derivatives by Triton kernels against plain torch."""

import pytest
import torch
from kernel_devices import assert_same, counted, each_device, kernels_on, values
from torch import nn

from tightfit.ops.activation import few_bit_activation, gated_activation, slope_of
from tightfit.ops.activation.few_bit import STEPS, levels, pack_codes, unpack_codes
from tightfit.ops.activation.torch import kind_of
from tightfit.ops.affine import Affine
from tightfit.ops.source import source_of

# an ulp or two of the exponential, and of what is rounded in between (the interpreter cuts bfloat16 off)
TOLERANCE = {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 3e-2}
each_dtype = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
each_function = pytest.mark.parametrize("function", [nn.SiLU(), nn.GELU(), nn.GELU(approximate="tanh")], ids=kind_of)


def close(found, wanted, dtype):
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    scale = float(wanted.nan_to_num(0, 0, 0).abs().max())
    torch.testing.assert_close(found, wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale / 4, equal_nan=True)


def run(gate, up, function, pull, codec=None):
    """Output, rebuilt output, gradients."""
    gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
    out = gated_activation(gate, up, function, slope_of(function), codec=codec)
    source = source_of(out)
    again = source.rebuild(source.kept)
    out.backward(pull)
    return out.detach(), again, gate.grad, up.grad


@each_device
@each_dtype
@each_function
def test_gated_activations(function, dtype, device, kernels_on, counted):
    gate, up, pull = (values(3, 7, 50, dtype=dtype, device=device, seed=seed) for seed in (1, 2, 3))
    gate = gate * 4
    ours = run(gate, up, function, pull)
    assert counted == ["_product", "_gated_backward"]
    kernels_on(False)
    theirs = run(gate, up, function, pull)
    assert torch.equal(ours[0], theirs[0])
    for one, other in zip(ours[1:], theirs[1:]):
        close(one, other, dtype)


@each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gated_activations_in_code(dtype, device, kernels_on, counted):
    function, codec = nn.SiLU(), Affine(8)
    gate, up, pull = (values(4, 160, dtype=dtype, device=device, seed=seed) for seed in (1, 2, 3))
    given = gate.clone(), up.clone()
    ours = run(gate, up, function, pull, codec)
    assert counted == ["_pack"] * 2 + ["_unpack"] * 2 + ["_product"] + ["_unpack"] * 2 + ["_gated_backward"]
    assert torch.equal(gate, given[0]) and torch.equal(up, given[1])  # only decoded copies are written over
    decoded = [codec.decode(codec.encode(t), t.shape, t.dtype) for t in (gate, up)]
    kernels_on(False)
    theirs = run(*decoded, function, pull)
    for one, other in zip(ours[1:], theirs[1:]):
        close(one, other, dtype)


@each_device
def test_strided_and_large_inputs(device, kernels_on):
    both = values(5, 6, 80, device=device) * torch.tensor([1.0, 200.0], device=device).repeat(40)
    gate, up = both.chunk(2, dim=-1)
    pull = values(80, 6, 5, device=device, seed=3).permute(2, 1, 0)[..., :40]
    for function in (nn.SiLU(), nn.GELU(), nn.GELU(approximate="tanh")):
        kernels_on()
        ours = run(gate, up, function, pull)
        kernels_on(False)
        for one, other in zip(ours, run(gate, up, function, pull)):
            close(one, other, torch.float32)


@each_device
def test_what_is_not_finite(device, kernels_on):
    gate, up, pull = (values(1, 40, device=device, seed=seed) for seed in (1, 2, 3))
    for place, bad in enumerate((float("nan"), float("inf"), -float("inf"), 1e30, -1e30)):
        gate[0, place] = up[0, place + 5] = pull[0, place + 10] = bad
    for function in (nn.SiLU(), nn.GELU(), nn.GELU(approximate="tanh")):
        kernels_on()
        ours = run(gate, up, function, pull)
        kernels_on(False)
        for one, other in zip(ours, run(gate, up, function, pull)):
            assert torch.equal(one.isfinite(), other.isfinite())  # inf or NaN is up to the order of operations
            sound = other.isfinite() & (other.abs() < 1e6)
            close(one[sound], other[sound], torch.float32)


@each_device
def test_what_no_kernel_takes(device, kernels_on, counted):
    x = values(2, 8, device=device)
    for gate, up, function in (
        (x.double(), x.double(), nn.SiLU()),
        (x.bfloat16(), x, nn.SiLU()),
        (x[:0], x[:0], nn.SiLU()),
        (x, x, nn.Mish()),
    ):
        gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
        gated_activation(gate, up, function, slope_of(function)).sum().backward()
        assert gate.grad.shape == gate.shape
    assert not counted


@each_device
@each_dtype
@pytest.mark.parametrize("kind, function", [("gelu", nn.GELU()), ("silu", nn.SiLU())], ids=["gelu", "silu"])
@pytest.mark.parametrize("shape", [(3, 5, 7), (4, 600)], ids=str)
def test_stepped_derivatives(shape, kind, function, dtype, device, counted):
    x = (values(*shape, device=device) * 5).to(dtype)
    x[0, 0], x.view(-1)[-1], x.view(-1)[-2] = float("nan"), float("inf"), -float("inf")
    pull = values(*shape, dtype=dtype, device=device, seed=2)
    leaf = x.clone().requires_grad_()
    out = few_bit_activation(leaf, function, kind)
    packed = out.grad_fn.saved_tensors[0]
    out.backward(pull)
    assert counted == ["_step_codes", "_stepped"]
    assert_same(out.detach(), function(x))
    # thresholds in float32, as on a GPU; a CPU compares low precision with a rounded threshold
    codes = sum((x.float() > threshold).to(torch.uint8) for threshold, _ in STEPS[kind])
    assert torch.equal(packed, pack_codes(codes))
    table = torch.tensor(levels(kind), dtype=dtype, device=device)
    wanted = unpack_codes(packed, x.numel(), table).view(shape) * pull
    rtol = 2**-6 if dtype == torch.bfloat16 else 1e-3 if dtype == torch.float16 else 0
    torch.testing.assert_close(leaf.grad, wanted, rtol=rtol, atol=0)


@each_device
def test_stepped_derivatives_of_strided_inputs(device, kernels_on):
    x, pull = values(6, 9, device=device).t(), values(9, 12, device=device, seed=2)[:, ::2]
    made = []
    for on in (True, False):
        kernels_on(on)
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        few_bit_activation(leaf, nn.SiLU(), "silu").backward(pull)
        made.append(leaf.grad)
    assert torch.equal(*made)
