# ruff: noqa: F401, F811 (fixtures are imported)
"""Backwards of norms by a Triton kernel against those in plain torch."""

import pytest
import torch
from kernel_devices import counted, each_device, kernels_on, values

from tightfit.ops.affine import Affine
from tightfit.ops.norm import layer_norm, rms_norm
from tightfit.ops.norm import torch as plain

# sums of a row are taken in another order, in float32; low precision rounds once more, by an ulp (see kernel_devices)
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
each_dtype = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)


def rms(x, weight, offset):
    wide = x.float()
    return ((weight.float() + offset) * wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def grads(kernels_on, on, call, *tensors, pull):
    """The output, and the gradients of leaves made of the tensors."""
    kernels_on(on)
    leaves = [
        None if t is None else t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors
    ]
    out = call(*leaves)
    out.backward(pull.to(out.dtype))
    return [out.detach(), *(t.grad for t in leaves if t is not None)]


def both(kernels_on, call, *tensors, pull, rtol):
    ours = grads(kernels_on, True, call, *tensors, pull=pull)
    theirs = grads(kernels_on, False, call, *tensors, pull=pull)
    assert torch.equal(ours[0], theirs[0])
    for one, other in zip(ours[1:], theirs[1:]):
        assert one.dtype == other.dtype and one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=rtol, atol=rtol * float(other.abs().max()))


@each_device
@each_dtype
@pytest.mark.parametrize("shape, offset", [((5, 7), 0.0), ((2, 9, 96), 1.0), ((33, 1), 0.0)], ids=str)
def test_rms_norm(shape, offset, dtype, device, kernels_on, counted):
    x, weight = values(*shape, dtype=dtype, device=device), values(shape[-1], dtype=dtype, device=device, seed=2)
    pull = values(*shape, dtype=dtype, device=device, seed=3)

    def call(x, weight):
        return rms_norm(x, weight, 1e-6, lambda t: rms(t, weight, offset), offset=offset)

    both(kernels_on, call, x, weight, pull=pull, rtol=TOLERANCE[dtype])
    assert len(counted) == 1


@each_device
@each_dtype
@pytest.mark.parametrize("shape, row", [((5, 7), (7,)), ((2, 9, 96), (96,)), ((3, 4, 5), (4, 5))], ids=str)
def test_layer_norm(shape, row, dtype, device, kernels_on, counted):
    x, pull = (values(*shape, dtype=dtype, device=device, seed=seed) for seed in (1, 4))
    weight, bias = (values(*row, dtype=dtype, device=device, seed=seed) for seed in (2, 3))
    x = x * 3 + 1
    for w, b in ((weight, bias), (weight, None), (None, None)):
        both(kernels_on, lambda x, w, b: layer_norm(x, row, w, b, 1e-5), x, w, b, pull=pull, rtol=TOLERANCE[dtype])
    assert len(counted) == 3


@each_device
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_in_code(kind, device, kernels_on, counted):
    codec = Affine(8)
    x, pull = (values(6, 200, device=device, seed=seed) for seed in (1, 4))
    weight, bias = (values(200, device=device, seed=seed) for seed in (2, 3))

    def call(x, weight, bias=None):
        if kind == "rms":
            return rms_norm(x, weight, 1e-6, lambda t: rms(t, weight, 0.0), codec=codec)
        return layer_norm(x, (200,), weight, bias, 1e-5, codec=codec)

    tensors = (x, weight) if kind == "rms" else (x, weight, bias)
    # the codes are made by another kernel on a CPU, which may round a tie apart: by D = 5 / 255
    both(kernels_on, call, *tensors, pull=pull, rtol=2e-5 if device == "cuda" else 5e-3)
    assert sorted(counted) == ["_backward", "_pack", "_unpack"]


@each_device
def test_only_the_gradients_asked_for(device, kernels_on):
    x, weight, bias = (values(3, 8, device=device), *(values(8, device=device, seed=seed) for seed in (2, 3)))
    for wanted in ((True, False, False), (False, True, True), (False, False, True), (True, True, False)):
        leaves = [t.clone().requires_grad_(want) for t, want in zip((x, weight, bias), wanted)]
        layer_norm(leaves[0], (8,), leaves[1], leaves[2], 1e-5).sum().backward()
        assert [t.grad is not None for t in leaves] == list(wanted)
    for wanted in ((True, False), (False, True)):
        leaves = [t.clone().requires_grad_(want) for t, want in zip((x, weight), wanted)]
        rms_norm(leaves[0], leaves[1], 1e-6, lambda t, w=leaves[1]: rms(t, w, 0.0)).sum().backward()
        assert [t.grad is not None for t in leaves] == list(wanted)


@each_device
def test_types_that_differ(device, kernels_on):
    """A bfloat16 input under float32 weights, as under autocast, and the other way round."""
    for kind, weight_kind in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        x, weight = values(4, 40, dtype=kind, device=device), values(40, dtype=weight_kind, device=device, seed=2)
        pull = values(4, 40, device=device, seed=3)

        def call(x, weight):
            return rms_norm(x, weight, 1e-6, lambda t: rms(t, weight, 0.0).float())

        both(kernels_on, call, x, weight, pull=pull, rtol=1.6e-2)


@each_device
def test_strided_inputs_and_gradients(device, kernels_on):
    weight, bias = (values(24, device=device, seed=seed) for seed in (2, 3))
    wide, tall = values(5, 6, 48, device=device), values(24, 6, 5, device=device)
    pull = values(24, 6, 5, device=device, seed=4).permute(2, 1, 0)
    for x in (wide[..., ::2], wide[..., 24:], tall.permute(2, 1, 0)):
        both(kernels_on, lambda x, w, b: layer_norm(x, (24,), w, b, 1e-5), x, weight, bias, pull=pull, rtol=2e-5)
    expanded = torch.ones(1, 1, 1, device=device).expand(5, 6, 24)
    both(
        kernels_on,
        lambda x, w, b: layer_norm(x, (24,), w, b, 1e-5),
        wide[..., :24],
        weight,
        bias,
        pull=expanded,
        rtol=2e-5,
    )


@each_device
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(bad, device, kernels_on):
    x, weight = values(6, 40, device=device), values(40, device=device, seed=2)
    x[2, 3] = bad
    for on in (True, False):
        found = grads(
            kernels_on, on, lambda x, w: rms_norm(x, w, 1e-6, lambda t: rms(t, w, 0.0)), x, weight, pull=x.sign()
        )
        assert found[1].isnan().any(1).tolist() == [False, False, True, False, False, False]
        assert found[2].isnan().any()
    pull = torch.ones_like(x)
    pull[4, 1] = bad
    for on in (True, False):
        found = grads(kernels_on, on, lambda x: layer_norm(x, (40,), None, None, 1e-5), x.nan_to_num(0, 0), pull=pull)
        assert found[1].isfinite().all(1).tolist() == [True, True, True, True, False, True]


@each_device
def test_sums_over_many_rows(device, kernels_on):
    """More rows than programs: a program's rows add up, twice the same."""
    x, weight, bias = values(50, 16, device=device), *(values(16, device=device, seed=seed) for seed in (2, 3))
    pull = values(50, 16, device=device, seed=4)
    made = [
        grads(kernels_on, on, lambda x, w, b: layer_norm(x, (16,), w, b, 1e-5), x, weight, bias, pull=pull)
        for on in (True, True, False)
    ]
    assert all(torch.equal(a, b) for a, b in zip(made[0], made[1]))
    torch.testing.assert_close(made[0][2:], made[2][2:], rtol=1e-5, atol=1e-4)


@each_device
def test_what_no_kernel_takes(device, kernels_on, counted):
    for x in (
        values(2, plain.WIDEST + 1, device=device),
        values(2, 8, device=device).double(),
        torch.ones(0, 8, device=device),
    ):
        weight = torch.ones(x.shape[-1], dtype=x.dtype, device=device)
        leaf = x.requires_grad_()
        rms_norm(
            leaf, weight, 1e-6, lambda t: t * torch.rsqrt(t.square().mean(-1, keepdim=True) + 1e-6)
        ).sum().backward()
        assert leaf.grad.shape == x.shape
    assert not counted
