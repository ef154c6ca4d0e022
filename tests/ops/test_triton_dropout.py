# ruff: noqa: F401, F811 (fixtures are imported)
"""Dropout's bits by Triton kernels: the same bytes, the same products."""

import pytest
import torch
from kernel_devices import assert_same, counted, each_device, kernels_on, values

from tightfit.ops import bits
from tightfit.ops.dropout import dropout, triton
from tightfit.ops.dropout.torch import noise_like
from tightfit.ops.norm import layer_norm
from tightfit.ops.source import source_of

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@each_device
@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (3, 5, 7), (9, 1000)], ids=str)
def test_bits_are_those_of_plain_torch(shape, device, kernels_on):
    mask = values(*shape, device=device) > 0.3
    assert torch.equal(triton.pack(mask), bits.pack(mask))
    assert torch.equal(
        triton.pack(mask.t() if mask.dim() == 2 else mask), bits.pack(mask.t() if mask.dim() == 2 else mask)
    )


@each_device
@each_dtype
def test_gradients_are_those_of_plain_torch(dtype, device, kernels_on, counted):
    x, pull = (values(5, 7, 11, dtype=dtype, device=device, seed=seed) for seed in (1, 2))
    pull[0, 0, :3] = torch.tensor([float("nan"), float("inf"), -0.0])
    made = []
    for on in (True, False):
        kernels_on(on)
        torch.manual_seed(5)
        leaf = x.clone().requires_grad_()
        out = dropout(leaf, 0.3)
        packed = out.grad_fn.saved_tensors[0]
        out.backward(pull)
        made.append((out.detach(), packed, leaf.grad))
    assert counted == ["_pack", "_times_noise"]
    assert torch.equal(made[0][0], made[1][0]) and torch.equal(made[0][1], made[1][1])
    assert_same(made[0][2], made[1][2])


@each_device
def test_what_is_rebuilt_behind_a_dropout(device, kernels_on, counted):
    x = values(4, 24, device=device)
    made = []
    for on in (True, False):
        kernels_on(on)
        torch.manual_seed(5)
        out = dropout(layer_norm(x.clone().requires_grad_(), (24,), None, None, 1e-5), 0.4)
        source = source_of(out)
        made.append((out.detach(), source.rebuild(source.kept)))
    assert counted == ["_pack", "_times_noise"]
    assert torch.equal(made[0][0], made[0][1]) and torch.equal(made[0][1], made[1][1])


@each_device
def test_what_no_kernel_multiplies(device, kernels_on, counted):
    x = values(4, 24, device=device).double().requires_grad_()
    out = dropout(x, 0.5)
    out.sum().backward()
    assert counted == ["_pack"] and torch.equal(x.grad * x, out)
    strided = values(24, 4, device=device).t().requires_grad_()
    dropout(strided, 0.5).backward(values(4, 48, device=device)[:, ::2])
    assert strided.grad.shape == (4, 24)


@each_device
def test_the_share_that_is_dropped(device, kernels_on):
    noise, packed = noise_like(torch.ones(4000, device=device), 0.25)
    kept = bits.unpack(packed, 4000, torch.tensor(1.0, device=device))
    assert torch.equal(kept, (noise > 0).float()) and abs(float(kept.mean()) - 0.75) < 0.04
