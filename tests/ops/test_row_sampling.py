"""Sampled weight gradients: the mean is the exact gradient, the plan is the readable one, the variance as computed."""

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tightfit.ops.rows import MODES, Sample, kept_rows, reference, row_norms, sample_rows, weight_grad

F64 = torch.float64


def draws(scores, k, count, mode="pps", seed=0):
    """`count` samples from one random stream."""
    generator = torch.Generator().manual_seed(seed)
    return [sample_rows(scores, k, mode=mode, generator=generator) for _ in range(count)]


def lognormal(n, sigma=1.5, seed=1):
    return torch.randn(n, dtype=F64, generator=torch.Generator().manual_seed(seed)).mul(sigma).exp()


def problem(norms, width=32, seed=2):
    """x and grad (n, width) in which the outer product of row i has the norm `norms[i]`."""
    generator = torch.Generator().manual_seed(seed)
    x, grad = torch.randn(2, len(norms), width, dtype=F64, generator=generator)
    x, grad = (t / row_norms(t)[:, None] * norms.sqrt()[:, None] for t in (x, grad))
    return x, grad


def estimates(x, grad, samples):
    return torch.stack([weight_grad(x[s.rows], s, grad) for s in samples])


def weight_sums(samples, n):
    """(draws, n): how often each row counts in each sample."""
    rows, weights = torch.stack([s.rows for s in samples]), torch.stack([s.weights for s in samples])
    return torch.zeros(len(samples), n, dtype=weights.dtype).scatter_add_(1, rows, weights)


def check_unbiased(x, grad, scores, k, mode, count=400):
    """The error of the mean of `count` draws is what `count` independent draws leave, and no draw is exact."""
    exact = grad.T @ x
    made = estimates(x, grad, draws(scores, k, count, mode))
    variance = (made - exact).square().sum((1, 2)).mean()
    assert exact.numel() >= 1000
    assert variance > 1e-12 * exact.square().sum()
    assert (made.mean(0) - exact).norm() <= 1.5 * (variance / count).sqrt()


def one_heavy(n):
    scores = torch.rand(n, dtype=F64, generator=torch.Generator().manual_seed(3)) + 0.5
    scores[7] = 1200 * n
    return scores


@pytest.mark.parametrize("mode", MODES)
def test_the_mean_is_the_exact_gradient_for_heavy_tailed_scores(mode):
    norms = lognormal(256)
    check_unbiased(*problem(norms), norms, 77, mode)


@pytest.mark.parametrize("mode", MODES)
def test_the_mean_is_the_exact_gradient_whatever_the_scores(mode):
    x, grad = problem(lognormal(256))
    padding = torch.arange(256) % 4 == 3
    grad[padding] = 0.0
    scores = torch.rand(256, dtype=F64, generator=torch.Generator().manual_seed(5)).masked_fill(padding, 0.0)
    check_unbiased(x, grad, scores, 77, mode)


@pytest.mark.parametrize("mode", MODES)
def test_the_mean_is_exact_for_cold_scores(mode):
    x, grad = problem(lognormal(256))
    check_unbiased(x, grad, torch.zeros(256, dtype=F64), 77, mode)


@pytest.mark.parametrize("mode", MODES)
def test_the_mean_is_exact_without_winners(mode):
    scores = torch.rand(256, dtype=F64, generator=torch.Generator().manual_seed(6)) + 1.0
    assert reference.inclusion(scores, 77)[1] == [] == reference.paper_plan(scores, 77)[0]
    check_unbiased(*problem(lognormal(256)), scores, 77, mode)


@pytest.mark.parametrize("mode", MODES)
def test_the_mean_is_exact_where_winners_hold_nearly_all_the_mass(mode):
    scores = one_heavy(256)
    winners = reference.inclusion(scores, 77)[1]
    assert scores[winners].sum() > 0.999 * scores.sum()
    check_unbiased(*problem(torch.ones(256, dtype=F64)), scores, 77, mode)


@pytest.mark.parametrize("mode, sigma", [("pps", 0.3), ("pps", 1.5), ("wta", 1.5), ("crs", 1.5)])
def test_every_row_counts_once_on_average(mode, sigma):
    n, k, count = 64, 20, 4000
    scores = lognormal(n, sigma).clamp(min=0.1)
    pi, winners = reference.inclusion(scores, k)
    if mode == "pps":
        spread = 1 / pi - 1
    else:
        winners, q = ([], scores / scores.sum()) if mode == "crs" else reference.paper_plan(scores, k)
        spread = (1 / q - 1) / (k - len(winners))
    free = torch.ones(n, dtype=torch.bool)
    free[winners] = False
    counted = weight_sums(draws(scores, k, count, mode), n)
    z = (counted.mean(0) - 1) / (spread / count).sqrt()
    assert z[free].abs().max() <= 5
    assert torch.equal(counted[:, ~free], torch.ones(count, len(winners), dtype=F64))
    # the spread is the computed one too, so that the bound on z means what it says
    assert (counted.var(0)[free] / spread[free]).mean().item() == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(6))
def test_exactly_the_planned_number_of_distinct_rows(dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    n = int(torch.randint(2, 300, (), generator=generator))
    scores = lognormal(n, (0.0, 0.1, 1.0, 2.0, 5.0, 9.0)[seed], seed)
    scores = scores.masked_fill(torch.rand(n, generator=generator) < 0.3, 0.0).to(dtype)
    for k in {1, 2, n // 3, n // 2, int(0.7 * n), n - 1} - {0}:
        pi, winners = reference.inclusion(scores, k)
        planned = min(k, int((scores > 0).sum())) or k
        assert pi.sum().item() == pytest.approx(planned, rel=1e-12)
        for sample in draws(scores, k, 8):
            filled = sample.weights > 0
            rows = sample.rows[filled]
            assert len(sample.rows) == len(sample.weights) == k
            assert len(rows) == planned == len(rows.unique())
            assert (pi[rows] > 0).all() and set(winners) <= set(rows.tolist())
            torch.testing.assert_close(sample.weights[filled].double(), 1 / pi[rows], rtol=1e-6, atol=0)
            assert (sample.rows[~filled] == 0).all()


def mean_squared_error(norms, k, mode, count=300):
    x, grad = problem(norms, width=16)
    return (estimates(x, grad, draws(norms, k, count, mode)) - grad.T @ x).square().sum((1, 2)).mean().item()


def test_winners_and_drawing_without_replacement_lower_the_variance():
    n, k = 1024, kept_rows(1024, 0.3)
    crs, wta, pps = (mean_squared_error(lognormal(n), k, mode) for mode in ("crs", "wta", "pps"))
    assert wta <= 0.5 * crs
    assert pps <= 1.05 * wta
    crs, wta, pps = (mean_squared_error(torch.ones(n, dtype=F64), k, mode) for mode in ("crs", "wta", "pps"))
    assert wta <= 1.1 * crs
    assert pps <= 0.85 * crs


@pytest.mark.parametrize("mode", ["wta", "crs"])
def test_the_error_of_independent_draws_is_the_computed_one(mode):
    norms, k = lognormal(200), 60
    x, grad = problem(norms, width=6)
    terms = (grad[:, :, None] * x[:, None, :]).flatten(1)
    winners, q = reference.paper_plan(norms, k) if mode == "wta" else ([], norms / norms.sum())
    expected = reference.independent_variance(terms, winners, q, k - len(winners))
    made = estimates(x, grad, draws(norms, k, 1000, mode)) - grad.T @ x
    assert made.square().sum((1, 2)).mean().item() == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_pairs_of_rows_are_as_probable_as_over_all_orders_and_offsets(k):
    scores = torch.tensor([5.0, 1.0, 0.7, 0.4, 0.0, 0.9], dtype=F64)
    count = 3000
    samples = draws(scores, k, count)
    counted = (weight_sums(samples, 6) > 0).double()
    expected = reference.joint_inclusion(scores, k)
    torch.testing.assert_close(expected.diagonal(), reference.inclusion(scores, k)[0])
    deviation = (expected * (1 - expected) / count).clamp(min=0).sqrt()
    assert ((counted.T @ counted / count - expected).abs() <= 5 * deviation + 1e-9).all()

    x, grad = problem(torch.tensor([4.0, 1.5, 0.5, 0.4, 0.0, 1.0], dtype=F64), width=3)
    terms = (grad[:, :, None] * x[:, None, :]).flatten(1)
    made = estimates(x, grad, samples) - grad.T @ x
    expected = reference.systematic_variance(terms, scores, k)
    assert made.square().sum((1, 2)).mean().item() == pytest.approx(expected, rel=0.15)


def test_the_plan_wins_what_the_paper_wins():
    generator = torch.Generator().manual_seed(11)
    for case in range(500):
        n = int(torch.randint(3, 80, (), generator=generator))
        k = int(torch.randint(1, n, (), generator=generator))
        scores = lognormal(n, 3.0 * float(torch.rand((), generator=generator)), seed=case)
        winners = set(reference.paper_plan(scores, k)[0])
        certain = reference.inclusion(scores, k)[1]
        assert winners == set(certain)
        for mode in ("pps", "wta"):
            sample = sample_rows(scores, k, mode=mode, generator=generator)
            assert set(sample.rows[: len(winners)].tolist()) == winners
            assert (sample.weights[: len(winners)] == 1).all()
            # a single seat for a single row would have weight 1 too; random scores leave more rows than seats
            assert (sample.weights[len(winners) :] > 1).all() or mode == "wta"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("k", [5, 6, 50])
def test_as_many_rows_as_there_are_take_each_once(mode, k):
    scores = torch.tensor([3.0, 0.0, float("nan"), 1.0, 2.0])
    sample = sample_rows(scores, k, mode=mode)
    assert sample.rows.tolist() == [0, 1, 2, 3, 4] and sample.weights.tolist() == [1.0] * 5
    assert sample.rows.dtype == torch.int64 and sample.weights.dtype == torch.float32


@pytest.mark.parametrize("mode", ["pps", "wta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("live", [1, 3, 6])
def test_fewer_live_rows_than_slots_are_all_kept_exactly(mode, dtype, live):
    scores = torch.zeros(20, dtype=dtype)
    scores[4 : 4 + live] = torch.full((live,), 0.1, dtype=dtype)
    for sample in draws(scores, 6, 20, mode):
        assert sorted(sample.rows[:live].tolist()) == list(range(4, 4 + live))
        assert (sample.weights[:live] == 1).all()
        assert (sample.rows[live:] == 0).all() and (sample.weights[live:] == 0).all()
        assert sample.weights.dtype == dtype


def test_no_rows_give_a_zero_gradient():
    for mode in MODES:
        sample = sample_rows(torch.zeros(0), 16, mode=mode)
        assert sample.rows.shape == sample.weights.shape == (0,)
        assert torch.equal(weight_grad(torch.zeros(0, 3), sample, torch.zeros(0, 2)), torch.zeros(2, 3))
        assert torch.equal(
            weight_grad(torch.zeros(0, 3), sample, torch.zeros(0, 2), transposed=True), torch.zeros(3, 2)
        )
    assert kept_rows(0, 0.3) == 0 and row_norms(torch.zeros(2, 0, 4)).shape == (0,)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_broken_input_row_reaches_the_gradient(value, mode, dtype):
    x, grad = (t.to(dtype) for t in problem(lognormal(64), width=8))
    x[37, 3] = value
    scores = row_norms(x) * row_norms(grad)
    for sample in draws(scores, 16, 10, mode):
        assert not weight_grad(x[sample.rows], sample, grad)[:, 3].isfinite().any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_that_are_no_numbers_win(mode, dtype):
    scores = lognormal(40).to(dtype)
    broken = {3: float("nan"), 20: float("inf"), 31: -float("inf")}
    for i, value in broken.items():
        scores[i] = value
    for sample in draws(scores, 10, 20, mode):
        assert set(sample.rows[:3].tolist()) == set(broken) and (sample.weights[:3] == 1).all()
    if mode == "pps":  # and the others are sampled as if these were not there
        pi, _ = reference.inclusion(scores, 10)
        for sample in draws(scores, 10, 20):
            torch.testing.assert_close(sample.weights.double(), 1 / pi[sample.rows], rtol=1e-6, atol=0)

    few = torch.full((30,), float("nan"), dtype=dtype)
    few[::3] = 1.0
    counted = weight_sums(draws(few, 10, 1000, mode), 30).double()
    assert (counted[:, ::3] == 0).all()  # 20 certain rows for 10 slots: drawn among themselves
    broken = few.isnan()
    if mode != "pps":  # one slot is left for all the others, each of which comes once in eleven draws
        assert counted[:, broken].mean() == pytest.approx(1, rel=0.3)
    else:
        assert counted[:, broken].mean(0) == pytest.approx(torch.ones(20).numpy(), rel=0.2)


@pytest.mark.parametrize("mode", MODES)
def test_negative_scores_are_never_drawn(mode):
    scores = lognormal(40)
    scores[::2] *= -1
    counted = weight_sums(draws(scores, 10, 200, mode), 40)
    assert (counted[:, ::2] == 0).all() and (counted[:, 1::2].sum(0) > 0).any()
    assert len(sample_rows(torch.full((40,), -1.0), 10, mode=mode).rows.unique()) > 1


@pytest.mark.parametrize("scale", [1e-300, 1.0, 1.7e308])
def test_the_scale_of_the_scores_is_of_no_account(scale):
    scores = lognormal(200)
    sample = sample_rows(scores, 50, generator=torch.Generator().manual_seed(1))
    scaled = sample_rows(scores / scores.max() * scale, 50, generator=torch.Generator().manual_seed(1))
    assert torch.equal(sample.rows, scaled.rows)
    torch.testing.assert_close(sample.weights, scaled.weights)


@pytest.mark.parametrize("mode", MODES)
def test_a_seed_gives_the_same_sample(mode):
    scores = lognormal(200)
    first, again, other = (draws(scores, 60, 1, mode, seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first.rows, again.rows) and torch.equal(first.weights, again.weights)
    assert not torch.equal(first.rows, other.rows)
    torch.manual_seed(5)
    first = sample_rows(scores, 60, mode=mode)
    torch.manual_seed(5)
    assert torch.equal(first.rows, sample_rows(scores, 60, mode=mode).rows)
    copied = copy.deepcopy(first)
    assert isinstance(copied, Sample) and torch.equal(copied.rows, first.rows)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shapes_are_known_without_values(mode, dtype):
    with FakeTensorMode() as fake:
        x, grad = torch.empty(4, 25, 8, dtype=dtype), torch.empty(100, 6, dtype=dtype)
        sample = sample_rows(row_norms(x) * row_norms(grad), 30, mode=mode)
        made = weight_grad(x.flatten(0, 1)[sample.rows], sample, grad)
        assert made.fake_mode is fake
    real = sample_rows(torch.ones(100, dtype=dtype), 30, mode=mode)
    assert sample.rows.shape == real.rows.shape == (30,) and sample.rows.dtype == real.rows.dtype
    assert sample.weights.shape == real.weights.shape == (30,) and sample.weights.dtype == real.weights.dtype
    assert made.shape == (6, 8) and made.dtype == dtype


@pytest.mark.parametrize("mode", MODES)
def test_one_graph_without_a_look_at_a_value(mode):
    """Tracing fails on any branch or shape that depends on a value."""

    def step(x, grad):
        sample = sample_rows(row_norms(x) * row_norms(grad), 30, mode=mode)
        return weight_grad(x.index_select(0, sample.rows), sample, grad)

    traced = torch.fx.experimental.proxy_tensor.make_fx(step, tracing_mode="fake")(
        torch.ones(100, 8), torch.ones(100, 6)
    )
    assert traced(torch.randn(100, 8), torch.randn(100, 6)).shape == (6, 8)


def test_scores_and_inputs_are_left_alone():
    scores, grad = lognormal(50).requires_grad_(), torch.randn(50, 4, dtype=F64)
    before, kept = scores.detach().clone(), grad.clone()
    sample = sample_rows(scores, 15)
    weight_grad(torch.randn(15, 3, dtype=F64), sample, grad)
    assert torch.equal(scores.detach(), before) and torch.equal(grad, kept)
    assert not sample.weights.requires_grad


def test_the_transposed_gradient_is_the_transpose():
    x, grad = problem(lognormal(50), width=5)
    sample = sample_rows(row_norms(x), 15)
    wide = weight_grad(x[sample.rows], sample, grad[:, :3])
    assert wide.shape == (3, 5)
    torch.testing.assert_close(weight_grad(x[sample.rows], sample, grad[:, :3], transposed=True), wide.T)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_row_norms(dtype):
    x = torch.randn(3, 7, 500, dtype=F64).mul(30).to(dtype)
    x[1, 2] = 60000.0  # its length is no float16
    norms = row_norms(x)
    assert norms.dtype == (F64 if dtype == F64 else torch.float32) and norms.shape == (21,)
    expected = x.double().square().sum(-1).sqrt().flatten()
    rtol = {torch.float64: 1e-12, torch.bfloat16: 4e-3}.get(dtype, 1e-5)
    torch.testing.assert_close(norms.double(), expected, rtol=rtol, atol=0)


def test_kept_rows():
    assert [kept_rows(n, 0.1) for n in (0, 5, 16, 100, 161, 300, 1000)] == [0, 5, 16, 16, 17, 30, 100]
    assert kept_rows(30, 0.1, min_rows=1) == 3 and kept_rows(31, 0.1, min_rows=1) == 4
    assert kept_rows(77, 1.0) == 77
    assert kept_rows(100, 0.07, min_rows=1) == 7


def test_bad_arguments_are_refused():
    scores = torch.ones(20)
    for budget in (0, -0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="budget"):
            kept_rows(10, budget)
    with pytest.raises(ValueError, match="min_rows"):
        kept_rows(10, 0.5, min_rows=0)
    with pytest.raises(ValueError, match="pps, wta, crs"):
        sample_rows(scores, 5, mode="best")
    with pytest.raises(ValueError, match="k is 0"):
        sample_rows(scores, 0)
    with pytest.raises(ValueError, match=r"shape \(4, 5\)"):
        sample_rows(scores.view(4, 5), 5)
    for wrong in (scores.int(), scores.bool(), scores.cfloat()):
        with pytest.raises(TypeError, match="floating-point"):
            sample_rows(wrong, 5)
        with pytest.raises(TypeError, match="floating-point"):
            row_norms(wrong)
    sample = sample_rows(scores, 5)
    for x, grad in (((20, 3), (20, 2)), ((5, 3), (4, 2)), ((5,), (20, 2)), ((5, 3), (4, 5, 2))):
        with pytest.raises(ValueError, match="sample of 5 rows"):
            weight_grad(torch.ones(x), sample, torch.ones(grad))
    with pytest.raises(ValueError, match="sample of 5 rows"):
        weight_grad(torch.ones(5, 3), Sample(sample.rows, torch.ones(4)), torch.ones(20, 2))
