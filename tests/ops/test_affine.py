"""Affine codes: the error stays below its bound, what is lost says so, and both ways of packing agree."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tightfit.ops.affine import Affine, reference
from tightfit.ops.affine.torch import _pack, _unpack, affine_pack, affine_unpack, row_bytes

BITS = (8, 4)
FLOOR = {8: 1.1e-8, 4: 2**-21}  # of the CPU kernel's inverse step; of float16's smallest steps, 15 of them and one more
each_bits = pytest.mark.parametrize("bits", BITS)
each_rounding = pytest.mark.parametrize("rounding", ["nearest", "stochastic"])


def gaussian(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def round_trip(codec, x):
    return codec.decode(codec.encode(x), x.shape, x.dtype)


def limits(x, codec):
    """The error that each element of x may come back with.

    Half a step D (a whole one if stochastic), and what the range itself is rounded by: float32 for 8 bits; for 4 bits
    float16, to nearest by the kernel and outwards by the plain packing, by at most 2^-10 of the minimum and 2^-9 of D.
    """
    group = codec.group_of(x.shape[-1])[0]
    _, step = reference.round_trip(x, codec.bits, group)
    largest = x.double().abs().unsqueeze(-2).amax(-1).expand(x.shape)
    share = 0.5 if codec.rounding == "nearest" else 1.0
    range_ = largest * (2**-21 if codec.bits == 8 else 2**-10)
    output = largest * torch.finfo(x.dtype).eps
    return share * 1.005 * step + (0.01 * step if codec.bits == 4 else 0.0) + range_ + output + FLOOR[codec.bits]


def assert_within(x, codec):
    found = round_trip(codec, x)
    assert found.shape == x.shape and found.dtype == x.dtype
    assert ((found.double() - x.double()).abs() <= limits(x, codec)).all()


# -- bounds -------------------------------------------------------------------------------------------------------


@each_bits
@each_rounding
@pytest.mark.parametrize("width", [1, 7, 100, 1009, 1376, 3072])
def test_the_error_is_below_a_step(width, bits, rounding):
    codec = Affine(bits, rounding=rounding)
    assert_within(gaussian(5, width), codec)
    assert_within(gaussian(5, width) * 1e-3 + 5, codec)  # far from zero
    assert_within(gaussian(5, width).exp(), codec)


@each_bits
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_floating_point_type_comes_back_as_it_was(dtype, bits):
    for rounding in ("nearest", "stochastic"):
        assert_within(gaussian(4, 256, dtype=dtype), Affine(bits, rounding=rounding))


@each_bits
@pytest.mark.parametrize("width", [7, 96, 300, 1009])
def test_nearest_codes_are_those_of_the_plain_loops(width, bits):
    codec, x = Affine(bits), gaussian(6, width)
    wanted, step = reference.round_trip(x, bits, codec.group_of(width)[0])
    away = ((round_trip(codec, x).double() - wanted) / step.clamp_min(1e-30)).abs()
    # an element close to the middle between two codes may take the other one; with 4 bits the range is in float16
    assert (away < (0.02 if bits == 8 else 0.05)).double().mean() > 0.98
    assert away.max() < 1.05


@each_bits
def test_stochastic_codes_are_unbiased(bits):
    count, x = 400, gaussian(3, 256)
    codec = Affine(bits, rounding="stochastic")
    made = torch.stack([round_trip(codec, x) for _ in range(count)]).double()
    step = reference.round_trip(x, bits, 128)[1]
    # a code's deviation is at most D / 2; float16 moves the step by 2^-9 and more, never the mean
    assert ((made.mean(0) - x).abs() <= 5 * 1.01 * step / (2 * count**0.5) + 1e-6).all()
    assert made.std(0).max() > 0.3 * step.max()  # it is random
    # over all elements: errors of mean zero
    error = ((made.mean(0) - x) / step).flatten()
    assert error.mean().abs() < 5 * 0.5 / (count * error.numel()) ** 0.5


@each_bits
def test_signal_to_noise_on_gaussian_rows(bits):
    # Codes err uniformly by +-D/2, so the noise is D^2/12, twice that if stochastic (f (1 - f) D^2, f uniform).
    # 128 Gaussian numbers span 5.2 +- 0.6, so D = 5.2 / (2^b - 1): 10 log10(12 (2^b - 1)^2 / E[span^2]) with
    # E[span^2] = 27.2 is 44.6 dB for 8 bits and 20.0 dB for 4; stochastic 3 dB less.
    x = gaussian(512, 3072)
    for rounding, loss in (("nearest", 0.0), ("stochastic", 3.01)):
        noise = (round_trip(Affine(bits, rounding=rounding), x) - x).square().mean()
        decibels = float(10 * torch.log10(x.square().mean() / noise))
        assert decibels == pytest.approx({8: 44.6, 4: 20.0}[bits] - loss, abs=0.2)


# -- edges --------------------------------------------------------------------------------------------------------


@each_bits
@each_rounding
def test_groups_without_a_range(bits, rounding):
    codec = Affine(bits, rounding=rounding)
    assert torch.equal(round_trip(codec, torch.zeros(2, 256)), torch.zeros(2, 256))
    # 0.75 and -3 are float16 numbers too; another constant is rounded to one with 4 bits
    for value in (0.75, -3.0):
        constant = torch.full((2, 256), value)
        torch.testing.assert_close(round_trip(codec, constant), constant, rtol=0 if bits == 8 else 2**-9, atol=0)
    assert_within(torch.full((2, 256), 1 / 3), codec)


@each_bits
@each_rounding
def test_an_outlier_costs_its_own_group_only(bits, rounding):
    codec, x = Affine(bits, rounding=rounding), gaussian(3, 384)
    x[1, 200] = 6e4
    assert_within(x, codec)
    quiet = torch.ones(3, 384, dtype=torch.bool)
    quiet[1, 128:256] = False
    error = (round_trip(codec, x) - x).abs()
    assert error[quiet].max() < (0.04 if bits == 8 else 0.6)


@each_bits
@each_rounding
def test_tiny_and_subnormal_numbers(bits, rounding):
    for scale in (1e-5, 1e-7, 1e-20, 1e-40):
        assert_within(gaussian(2, 256) * scale, Affine(bits, rounding=rounding))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("offset", [0.0, 100.04, -100.02, 3e4])
def test_the_range_that_is_kept_holds_every_element(bits, offset):
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) + offset
    (packed,) = Affine(bits=bits, rounding="stochastic").encode(x)
    kind = {8: torch.float32, 4: torch.float16}[bits]
    step, low = packed[:, -2 * kind.itemsize :].contiguous().view(kind).double().unbind(1)
    rounded = 0.0 if bits == 4 else 1e-6 * (1 + abs(offset))  # of float32's own arithmetic
    assert (low <= x.amin(1) + rounded).all()
    assert (low + (2**bits - 1) * step >= x.amax(1) - rounded).all()


@each_bits
@each_rounding
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_comes_back_as_nan_in_its_group_only(bad, bits, rounding):
    codec = Affine(bits, rounding=rounding)
    clean = gaussian(3, 384)
    x = clean.clone()
    x[1, 130] = bad
    x[2, 383] = bad
    found = round_trip(codec, x)
    lost = torch.zeros(3, 384, dtype=torch.bool)
    lost[1, 128:256] = lost[2, 256:] = True
    assert torch.equal(found.isnan(), lost)
    assert ((found - x).abs()[~lost] <= limits(clean, codec)[~lost]).all()


@each_rounding
def test_numbers_beyond_float16_are_nan_or_right_with_4_bits(rounding):
    codec = Affine(4, rounding=rounding)
    for value, lost in ((9e5, False), (-1e5, True), (1e6, True), (1e38, True)):
        x = gaussian(1, 128)
        x[0, 5] = value
        if lost:
            assert round_trip(codec, x).isnan().all()
        else:
            assert_within(x, codec)
    assert_within(gaussian(1, 128) * 1e30, Affine(8, rounding=rounding))


# -- layout -------------------------------------------------------------------------------------------------------


@each_bits
@pytest.mark.parametrize("group", [2, 8, 100, 128, 172])
def test_the_kernel_and_plain_torch_read_each_others_codes(group, bits):
    groups = gaussian(300, group)
    groups[0], groups[1] = 0.0, 2.5
    fast, plain = affine_pack(groups, bits), _pack(groups, bits, None)
    assert fast.shape == plain.shape == (300, row_bytes(group, bits)) and fast.dtype == plain.dtype == torch.uint8
    codec = Affine(bits, group)
    allowed = limits(groups, codec)
    for packed in (fast, plain):
        ours, theirs = _unpack(packed, bits), affine_unpack(packed, bits)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
        assert ((theirs - groups).abs() <= allowed).all()
    if bits == 8:
        assert (fast == plain).double().mean() > 0.98  # ties may go either way, so may the last bit of a step


@each_bits
def test_the_kernel_and_plain_torch_lose_the_same_groups(bits):
    groups = gaussian(6, 64)
    groups[1, 3], groups[2, 5], groups[3, 0] = float("nan"), float("inf"), -float("inf")
    groups[4, :2] = torch.tensor([float("inf"), -float("inf")])
    for pack in (affine_pack(groups, bits), _pack(groups, bits, None)):
        for found in (affine_unpack(pack, bits), _unpack(pack, bits)):
            assert found.isnan().all(1).tolist() == [False, True, True, True, True, False]
            assert found.isfinite().all(1).tolist() == [True, False, False, False, False, True]


@each_bits
@each_rounding
@pytest.mark.parametrize("shape", [(3, 1), (2, 5, 7), (4, 100), (2, 3, 1009), (2, 1376), (0, 768), (2, 0, 100)])
def test_bytes_are_as_stated_under_fake_tensors_too(shape, bits, rounding):
    codec = Affine(bits, rounding=rounding)
    x = torch.randn(shape)
    (packed,) = codec.encode(x)
    assert packed.nbytes == packed.untyped_storage().nbytes() == codec.nbytes(shape, x.dtype)
    assert codec.decode((packed,), x.shape, x.dtype).shape == shape
    assert _unpack(packed, bits).shape == affine_unpack(packed, bits).shape
    with FakeTensorMode():
        fake = torch.empty(shape, dtype=torch.bfloat16)
        (coded,) = codec.encode(fake)
        assert coded.shape == packed.shape and coded.dtype == packed.dtype
        again = codec.decode((coded,), fake.shape, fake.dtype)
        assert again.shape == shape and again.dtype == torch.bfloat16


def test_a_quarter_and_an_eighth_of_float32():
    shape = (16, 128, 768)
    whole = 4 * 16 * 128 * 768
    assert Affine(8).nbytes(shape, torch.float32) / whole == pytest.approx(0.25 + 8 / 512)
    assert Affine(4).nbytes(shape, torch.float32) / whole == pytest.approx(0.125 + 4 / 512)


@each_bits
def test_strided_inputs_are_encoded_as_their_values(bits):
    codec, x = Affine(bits), gaussian(4, 6, 200).transpose(0, 1)
    assert not x.is_contiguous()
    assert torch.equal(codec.encode(x)[0], codec.encode(x.contiguous())[0])
    assert_within(x, codec)
    wide = gaussian(8, 512)[:, ::2]
    assert torch.equal(codec.encode(wide)[0], codec.encode(wide.contiguous())[0])


@each_bits
def test_codes_stand_by_themselves(bits):
    codec, x = Affine(bits), gaussian(4, 256)
    packed = codec.encode(x)
    before = codec.decode(packed, x.shape, x.dtype)
    x.zero_()
    assert torch.equal(codec.decode(packed, x.shape, x.dtype), before)
    assert torch.equal(packed[0], Affine(bits).encode(gaussian(4, 256))[0])  # the same again


def test_stochastic_codes_follow_the_seed():
    codec, x = Affine(4, rounding="stochastic"), gaussian(4, 256)
    made = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        made.append(codec.encode(x)[0])
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


@each_bits
def test_the_custom_operators_keep_torchs_rules(bits):
    groups = gaussian(5, 64)
    torch.library.opcheck(affine_pack, (groups, bits))
    torch.library.opcheck(affine_unpack, (affine_pack(groups, bits), bits))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_what_is_not_floating_point_is_refused(dtype):
    with pytest.raises(TypeError, match=f"to encode is {dtype}, accepted is floating point"):
        Affine().encode(torch.zeros(2, 128, dtype=dtype))


def test_codecs_share_only_what_serves_both():
    assert Affine(8).shares_with(Affine(8))
    assert not Affine(8).shares_with(Affine(4)) and not Affine(8).shares_with(Affine(8, 64))
    assert not Affine(8).shares_with(Affine(8, rounding="stochastic"))


@pytest.mark.parametrize("size", [2, 3, 64, 128, 129])
def test_groups_are_even_and_cover_every_width(size):
    codec = Affine(8, size)
    for width in range(1, 1400, 7):
        group, padded = codec.group_of(width)
        assert group % 2 == 0 and padded % group == 0 and 0 <= padded - width < group
        assert group <= 1.5 * size + 1
