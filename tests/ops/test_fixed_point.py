"""Fixed-point streams: every step can be undone bit by bit, and packing is what the reference packs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tightfit.ops import fixed_point as fp
from tightfit.ops.fixed_point import reference as ref

NUMBERS = st.lists(st.integers(1 - fp.LIMIT, fp.LIMIT - 1), min_size=1, max_size=21)


def ints(values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("k", range(13))
@pytest.mark.parametrize("count", [1, 3, 8, 37])
def test_packing_is_the_references_and_comes_back(k, count):
    values = torch.randint(-(2**31), 2**31 - 1, (count,), dtype=torch.int64).to(torch.int32)
    if k == 0:
        assert ref.pack(values.tolist(), k) == []
        return
    packed = fp.pack(values, k)
    assert packed.tolist() == ref.pack(values.tolist(), k)
    assert packed.dtype == torch.uint8
    assert torch.equal(fp.unpack(packed, k, values.shape), values & (2**k - 1))
    assert packed.numel() <= count * k / 8 + 3


@settings(max_examples=60, deadline=None)
@given(lag=NUMBERS, k=st.integers(0, 12), about=st.booleans(), data=st.data())
def test_a_step_is_the_references_and_can_be_undone(lag, k, about, data):
    same = st.lists(st.integers(1 - fp.LIMIT, fp.LIMIT - 1), min_size=len(lag), max_size=len(lag))
    base, origin = data.draw(same), data.draw(same)
    given_origin = ints(origin) if about else None
    out, dropped = fp.advance(ints(lag), ints(base), given_origin, k)
    wanted = [ref.advance(a, b, c if about else 0, k) for a, b, c in zip(lag, base, origin)]
    assert out.tolist() == [number for number, _ in wanted]
    assert fp.retreat(out, ints(base), given_origin, dropped, k).tolist() == lag
    for (number, rest), a, b, c in zip(wanted, lag, base, origin):
        assert ref.retreat(number, b, c if about else 0, rest, k) == a


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_to_fixed_point_and_back(dtype):
    x = torch.randn(50, dtype=torch.float64).to(dtype)
    fixed = fp.to_fixed(x, 20)
    assert fixed.tolist() == [ref.to_fixed(float(value), 20) for value in x]
    back = fp.from_fixed(fixed, 20, dtype)
    assert back.dtype == dtype
    torch.testing.assert_close(back, x, rtol=torch.finfo(dtype).eps, atol=2.0**-21)


def test_a_change_is_subtracted_in_float32():
    x = torch.tensor([1000.0]).bfloat16()
    out = torch.tensor([1008.0]).bfloat16()
    assert fp.change(out, x, 4).item() == 8 * 16
    assert fp.change(out.double(), x, 4).dtype == torch.int32


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e30, -600.0])
def test_what_does_not_fit_is_seen(value):
    bits, stream = 20, torch.zeros(4)
    stream[2] = value
    bad = fp.out_of_range(fp.to_fixed(stream, bits))
    assert bad
    assert fp.from_fixed(fp.to_fixed(torch.ones(4), bits), bits, torch.float32, bad).isnan().all()
    # also after a step from streams at the end of their range
    for lag in (fp.LIMIT - 1, 1 - fp.LIMIT):
        for state in (fp.LIMIT - 1, 1 - fp.LIMIT):
            for k in (0, 1, 4):
                base = ints([state] * 4) + fp.change(stream, torch.zeros(4), bits)
                out, _ = fp.advance(ints([lag] * 4), base, ints([state] * 4), k)
                if value != -600.0:
                    assert fp.out_of_range(out)
    assert not fp.out_of_range(ints([fp.LIMIT - 1, 1 - fp.LIMIT]))


def test_bits_leave_headroom():
    for largest in (1e-3, 0.5, 1.0, 7.3, 8.0, 3000.0, 1e5):
        bits = fp.finest(largest)
        assert largest * 2.0**bits * 16 <= fp.LIMIT
        assert bits == 24 or largest * 2.0**bits * 32 > fp.LIMIT
    assert fp.finest(0.0) == 24
