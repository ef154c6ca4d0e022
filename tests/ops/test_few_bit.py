"""Two bits an element: exact outputs, derivatives on four levels, a quarter of a byte kept."""

import gc

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tightfit.core.memory import saved_bytes
from tightfit.ops.activation import few_bit_activation
from tightfit.ops.activation.few_bit import STEPS, levels, pack_codes, unpack_codes

FUNCTIONS = {"gelu": nn.GELU(), "silu": nn.SiLU()}
each = pytest.mark.parametrize("kind", FUNCTIONS)


def slope(x, kind, pull=None):
    x = x.detach().requires_grad_()
    out = few_bit_activation(x, FUNCTIONS[kind], kind)
    return torch.autograd.grad(out, x, torch.ones_like(out) if pull is None else pull)[0]


@each
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_outputs_are_exact_and_slopes_are_on_four_levels(kind, dtype):
    x = torch.linspace(-9, 9, 1001).to(dtype)
    assert torch.equal(few_bit_activation(x.requires_grad_(), FUNCTIONS[kind], kind), FUNCTIONS[kind](x))
    found = slope(x, kind)
    assert found.dtype == dtype
    wanted = [float(torch.tensor(level, dtype=dtype)) for level in levels(kind)]
    assert set(found.tolist()) == set(wanted)
    # codes depend on the thresholds only
    passed = sum((x > threshold).long() for threshold, _ in STEPS[kind])
    assert torch.equal(found, torch.tensor(wanted, dtype=dtype)[passed])


@each
def test_the_steps_are_those_of_the_function(kind):
    x = torch.linspace(-12, 12, 4801, dtype=torch.float64)
    ramps = sum(increment * (x - threshold).clamp_min(0) for threshold, increment in STEPS[kind])
    off = ramps - FUNCTIONS[kind](x)
    assert off.abs().max() < {"gelu": 0.16, "silu": 0.28}[kind]
    assert off[[0, -1]].abs().max() < 2e-3  # it ends where the function does

    # no other middle threshold fits better: the squared distance has a minimum there
    def distance(shift):
        moved = [(t + (shift if n == 1 else 0), i) for n, (t, i) in enumerate(STEPS[kind])]
        return (sum(i * (x - t).clamp_min(0) for t, i in moved) - FUNCTIONS[kind](x)).square().sum()

    assert distance(0.0) < min(distance(-0.02), distance(0.02))


@each
def test_gradients_scale_with_what_comes_back(kind):
    x, pull = torch.randn(6, 50), torch.randn(6, 50)
    torch.testing.assert_close(slope(x, kind, pull), slope(x, kind) * pull, rtol=1e-6, atol=1e-7)
    x.requires_grad_()
    (exact,) = torch.autograd.grad(FUNCTIONS[kind](x), x, pull)
    cosine = torch.cosine_similarity(slope(x, kind, pull).flatten(), exact.flatten(), 0)
    assert cosine > 0.85


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 1023])
def test_codes_come_back(count):
    codes = torch.randint(4, (count,), dtype=torch.uint8)
    packed = pack_codes(codes)
    assert packed.dtype == torch.uint8 and packed.numel() == -(-count // 4)
    values = torch.tensor([0.0, 1.0, 2.0, 3.0])
    assert torch.equal(unpack_codes(packed, count, values), codes.float())


@each
def test_a_quarter_of_a_byte_is_kept(kind):
    x = torch.randn(8, 128, requires_grad=True)
    frozen = nn.Linear(128, 16).requires_grad_(False)
    gc.collect()
    assert saved_bytes(lambda: frozen(few_bit_activation(x, FUNCTIONS[kind], kind)).sum().backward()) == 8 * 128 // 4
    with torch.no_grad():
        assert saved_bytes(lambda: few_bit_activation(x, FUNCTIONS[kind], kind)) == 0
    assert not few_bit_activation(x.detach(), FUNCTIONS[kind], kind).requires_grad
    with FakeTensorMode():
        fake = torch.empty(2, 7, 33, requires_grad=True)
        few_bit_activation(fake, FUNCTIONS[kind], kind).sum().backward()
        assert fake.grad.shape == fake.shape


def test_checkpointing_and_broken_numbers():
    x = torch.randn(4, 32, requires_grad=True)
    function = lambda t: few_bit_activation(t, nn.SiLU(), "silu").square().sum()  # noqa: E731
    (wanted,) = torch.autograd.grad(function(x), x)
    (again,) = torch.autograd.grad(torch.utils.checkpoint.checkpoint(function, x, use_reentrant=False), x)
    assert torch.equal(again, wanted)
    broken = torch.randn(4, 32)
    broken[1, 2] = float("nan")
    broken.requires_grad_()
    (grad,) = torch.autograd.grad(function(broken), broken)
    assert grad.isnan().sum() == 1 and grad[1, 2].isnan()


def test_bad_input():
    x = torch.randn(4, requires_grad=True)
    with pytest.raises(
        ValueError, match=r"few_bit_activation\(kind=...\): got 'relu', accepted is one of 'gelu', 'silu'"
    ):
        few_bit_activation(x, nn.ReLU(), "relu")
    with pytest.raises(TypeError, match=r"the input is torch.int64, accepted is floating point"):
        few_bit_activation(torch.ones(3, dtype=torch.int64), nn.GELU(), "gelu")
    with pytest.raises(RuntimeError, match="few_bit_activation cannot be differentiated twice"):
        torch.autograd.grad(few_bit_activation(x, nn.GELU(), "gelu").sum(), x, create_graph=True)
