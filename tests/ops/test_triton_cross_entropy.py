# ruff: noqa: F401, F811 (fixtures are imported)
"""The chunked head loss with its softmax by Triton kernels, against plain torch and against full logits."""

import math

import pytest
import torch
from kernel_devices import counted, each_device, kernels_on, values

from tightfit.ops.linear_cross_entropy import linear_cross_entropy, reference, triton

# float32: another order of sums. Low precision: plain torch rounds the gradient of the logits to it as well, by an ulp
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
each_dtype = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
BOTH = ["_statistics", "_gradient"]


@pytest.fixture
def small_parts(monkeypatch):
    """Rows are cut into several parts, each of several blocks, at sizes that the interpreter can do."""
    monkeypatch.setattr(triton, "PART", 64)
    monkeypatch.setattr(triton, "BLOCK", 32)


def tensors(rows, dtype=torch.float32, device="cpu", tokens=5, width=12):
    hidden = values(tokens, width, dtype=dtype, device=device)
    weight = values(rows, width, dtype=dtype, device=device, seed=2)
    target = torch.randint(rows, (tokens,), generator=torch.Generator().manual_seed(3)).to(device)
    target[1] = -100
    return hidden, weight, target


def run(call, hidden, weight, target, bias=None, **how):
    """(loss, gradients of hidden, weight, bias)."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (hidden, weight, bias)]
    loss = call(leaves[0], leaves[1], target, bias=leaves[2], **how)
    loss.sum().backward()
    return [loss.detach(), *(t.grad for t in leaves if t is not None)]


def close(ours, theirs, tolerance):
    for one, other in zip(ours, theirs):
        assert one.dtype == other.dtype and one.shape == other.shape
        scale = float(other.abs().max())
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * scale)


@each_device
@each_dtype
@pytest.mark.parametrize("rows", [1, 64, 150])
def test_loss_and_gradients(rows, dtype, device, kernels_on, counted, small_parts):
    given = tensors(rows, dtype, device)
    ours = run(linear_cross_entropy, *given, chunk_tokens=2)
    assert counted == BOTH * 3
    kernels_on(False)
    close(ours, run(linear_cross_entropy, *given, chunk_tokens=2), TOLERANCE[dtype])
    if dtype == torch.float32:
        close(ours, run(reference.linear_cross_entropy, *given), 1e-5)


@each_device
@pytest.mark.parametrize(
    "how",
    [
        {"softcap": 3.0},
        {"scale": 0.25, "softcap": 30.0},
        {"label_smoothing": 0.1},
        {"label_smoothing": 0.2, "softcap": 2.0, "scale": 3.0},
        {"reduction": "sum"},
        {"reduction": "none", "softcap": 5.0},
        {"ignore_index": 3},
    ],
    ids=str,
)
def test_settings(how, device, kernels_on, counted, small_parts):
    hidden, weight, target = tensors(90, device=device)
    target[target == 3] = 4
    target[1] = how.get("ignore_index", -100)
    bias = values(90, device=device, seed=4)
    ours = run(linear_cross_entropy, hidden, weight, target, bias, **how)
    assert set(counted) == set(BOTH)
    kernels_on(False)
    theirs = run(linear_cross_entropy, hidden, weight, target, bias, **how)
    # tanh is made of an exponential here: up to 1e-7 of the cap, absolutely
    close(ours, theirs, 1e-5 if "softcap" in how else 3e-6)
    close(ours, run(reference.linear_cross_entropy, hidden, weight, target, bias, **how), 2e-5)


@each_device
@pytest.mark.parametrize("how", [{}, {"softcap": 4.0, "label_smoothing": 0.1}], ids=str)
def test_with_frozen_rows(how, device, kernels_on, counted, small_parts):
    hidden, weight, target = tensors(90, device=device)
    frozen = values(50, 12, device=device, seed=5) * 2
    target[::2] += 45  # some are frozen rows
    target[1] = -100
    made = []
    for on in (True, False):
        kernels_on(on)
        found = linear_cross_entropy(hidden, weight, target, frozen_weight=frozen, return_frozen_mass=True, **how)
        made.append([*run(linear_cross_entropy, hidden, weight, target, frozen_weight=frozen, **how), *found])
    assert counted.count("_gradient") == 1 and counted.count("_statistics") == 2
    close(*made, 1e-5)


@each_device
def test_large_and_infinite_logits(device, kernels_on, small_parts):
    hidden, weight, target = tensors(90, device=device)
    for factor in (1e3, 1e30):
        kernels_on()
        ours = run(linear_cross_entropy, hidden * factor, weight, target)
        kernels_on(False)
        close(ours, run(linear_cross_entropy, hidden * factor, weight, target), 1e-4)
    bias = torch.zeros(90, device=device)
    bias[:64] = -math.inf  # a whole part, and rows without it
    target[target >= 0] = 70
    kernels_on()
    ours = run(linear_cross_entropy, hidden, weight, target, bias)
    assert ours[0].isfinite() and ours[1].isfinite().all()
    kernels_on(False)
    close(ours, run(linear_cross_entropy, hidden, weight, target, bias), 3e-6)


@each_device
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_token(bad, device, kernels_on, small_parts):
    hidden, weight, target = tensors(90, device=device)
    hidden[4, 2] = bad
    made = []
    for on in (True, False):
        kernels_on(on)
        made.append(run(linear_cross_entropy, hidden, weight, target, reduction="none"))
    for one, other in zip(*made):
        assert torch.equal(one.isnan(), other.isnan())
    lost = made[0][1].isnan().any(1)
    assert lost[4] and lost.sum() == 1


@each_device
@pytest.mark.parametrize("rows", [9001])
def test_parts_as_they_are(rows, device, kernels_on, counted):
    given = tensors(rows, torch.bfloat16, device, tokens=2)
    ours = run(linear_cross_entropy, *given)
    kernels_on(False)
    close(ours, run(linear_cross_entropy, *given), TOLERANCE[torch.bfloat16])
    assert counted == BOTH


@each_device
def test_nothing_but_the_loss(device, kernels_on, counted, small_parts):
    hidden, weight, target = tensors(90, device=device)
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, target)
    assert counted == ["_statistics"]
    torch.testing.assert_close(loss, reference.linear_cross_entropy(hidden, weight, target))


@each_device
def test_what_no_kernel_takes(device, kernels_on, counted):
    hidden, weight, target = tensors(20, device=device)
    run(linear_cross_entropy, hidden.double(), weight.double(), target)
    run(linear_cross_entropy, hidden[:0], weight, target[:0])
    # the bias sums gradients before they are rounded
    low = hidden.bfloat16(), weight.bfloat16(), target, values(20, dtype=torch.bfloat16, device=device)
    run(linear_cross_entropy, *low)
    assert not counted


@each_device
def test_twice_the_same(device, kernels_on, small_parts):
    given = tensors(150, device=device)
    for one, other in zip(run(linear_cross_entropy, *given), run(linear_cross_entropy, *given)):
        assert torch.equal(one, other)
