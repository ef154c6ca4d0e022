# ruff: noqa: F401 (fixtures are imported)
"""Affine codes by Triton kernels: the bytes of the plain packing, and what comes back."""

import math

import pytest
import torch
from kernel_devices import assert_same, each_device, kernels_on, values

from tightfit.ops import kernels
from tightfit.ops.affine import Affine
from tightfit.ops.affine.torch import RANGE, _pack, _unpack, affine_pack, affine_unpack

pytestmark = pytest.mark.usefixtures("kernels_on")
each_bits = pytest.mark.parametrize("bits", [8, 4])


def groups_of(x, codec):
    """The rows that the plain packing gets."""
    group, width = codec.group_of(x.shape[-1])
    missing = width - x.shape[-1]
    return torch.cat([x, x[..., -1:].expand(*x.shape[:-1], missing)], dim=-1).reshape(-1, group).float()


def plain(x, codec):
    return _pack(groups_of(x, codec), codec.bits, None)


def halves(packed, bits):
    """(codes, ranges) of packed groups."""
    size = 2 * RANGE[bits].itemsize
    return packed[:, :-size], packed[:, -size:].contiguous().view(RANGE[bits])


@each_device
@each_bits
@pytest.mark.parametrize(
    "shape, dtype",
    [((3, 1), torch.float32), ((2, 5, 7), torch.float16), ((33, 128), torch.bfloat16), ((5, 1376), torch.float32)]
    + [((2, 3, 1009), dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)],
    ids=str,
)
def test_codes_are_those_of_plain_torch_bit_for_bit(shape, dtype, bits, device):
    codec, x = Affine(bits), values(*shape, dtype=dtype, device=device)
    assert kernels.use(x)
    (packed,) = codec.encode(x)
    assert torch.equal(packed, plain(x, codec))
    assert packed.nbytes == packed.untyped_storage().nbytes() == codec.nbytes(shape, dtype)
    again = codec.decode((packed,), x.shape, dtype)
    assert again.is_contiguous()
    _, width = codec.group_of(shape[-1])
    wanted = _unpack(packed, bits).to(dtype).view(*shape[:-1], width)[..., : shape[-1]]
    assert_same(again, wanted)


@each_device
@each_bits
def test_groups_of_every_size(bits, device):
    for size in (2, 6, 172, 300):
        codec, x = Affine(bits, size), values(7, 3 * size, device=device).exp()
        (packed,) = codec.encode(x)
        assert torch.equal(packed, plain(x, codec)), size


@each_device
@each_bits
def test_scales_and_offsets(bits, device):
    codec = Affine(bits)
    for factor, offset in ((1e-3, 5.0), (1e-7, 0.0), (1e-40, 0.0), (1e3, -3e4), (0.0, 1 / 3), (0.0, 0.0)):
        x = values(6, 256, device=device) * factor + offset
        (packed,) = codec.encode(x)
        assert torch.equal(packed, plain(x, codec)), (factor, offset)
        assert_same(codec.decode((packed,), x.shape, x.dtype), _unpack(packed, bits).view(x.shape))


@each_device
@each_bits
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38, -1e5])
def test_what_is_not_finite_or_too_large(bad, bits, device):
    codec, x = Affine(bits), values(3, 384, device=device)
    x[1, 130], x[2, 383] = bad, bad
    x[2, 300] = -bad
    (packed,) = codec.encode(x)
    ours, theirs = halves(packed, bits), halves(plain(x, codec), bits)
    assert torch.equal(ours[0], theirs[0])
    assert_same(ours[1], theirs[1])
    found, wanted = codec.decode((packed,), x.shape, x.dtype), _unpack(plain(x, codec), bits).view(x.shape)
    assert_same(found, wanted)
    if not math.isfinite(bad):
        lost = torch.zeros(3, 384, dtype=torch.bool)
        lost[1, 128:256] = lost[2, 256:] = True
        assert torch.equal(found.isnan().cpu(), lost)


@each_device
@each_bits
def test_strided_inputs_are_encoded_as_their_values(bits, device):
    codec = Affine(bits)
    for x in (
        values(4, 6, 200, device=device).transpose(0, 1),
        values(8, 512, device=device)[:, ::2],
        values(200, 6, device=device).t(),
        values(1, 200, device=device).expand(5, 200),
    ):
        assert torch.equal(codec.encode(x)[0], codec.encode(x.contiguous())[0])


@each_device
@each_bits
def test_stochastic_codes(bits, device):
    codec, x = Affine(bits, rounding="stochastic"), values(8, 256, device=device)
    made = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        made.append(codec.encode(x)[0])
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
    step = halves(made[0], bits)[1].float()[:, 0].view(8, 2).repeat_interleave(128, dim=1)
    count = 12
    decoded = torch.stack([codec.decode(codec.encode(x), x.shape, x.dtype) for _ in range(count)]).double()
    assert ((decoded - x).abs() <= 1.01 * step).all()
    # an element's deviation is at most D / 2; over all elements the errors are independent with mean zero
    assert ((decoded.mean(0) - x).abs() <= 5 * 1.01 * step / (2 * count**0.5)).all()
    error = ((decoded.mean(0) - x) / step).flatten()
    assert error.mean().abs() < 5 * 0.5 / (count * error.numel()) ** 0.5
    # neighbours draw apart, also the two that share a byte
    away = ((decoded - x) / step).flatten(1)
    pairs = torch.corrcoef(torch.stack([away[:, 0::2].flatten(), away[:, 1::2].flatten()]))
    assert pairs[0, 1].abs() < 0.05


@each_device
@each_bits
def test_the_custom_operators_run_kernels_too(bits, device):
    groups = values(9, 60, device=device)
    packed = affine_pack(groups, bits)
    assert torch.equal(packed, _pack(groups, bits, None))
    assert torch.equal(affine_unpack(packed, bits), _unpack(packed, bits))


@each_device
@each_bits
def test_no_rows(bits, device):
    for shape in ((0, 768), (2, 0, 100)):
        codec, x = Affine(bits), torch.empty(shape, device=device)
        packed = codec.encode(x)
        assert packed[0].shape[0] == 0 and codec.decode(packed, x.shape, x.dtype).shape == shape
