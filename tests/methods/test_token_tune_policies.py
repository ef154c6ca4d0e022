"""Policies and budgets, the random source, and the loss over selected tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tightfit.methods.token_tune import policies
from tightfit.methods.token_tune.loss import targets_of, token_loss
from tightfit.methods.token_tune.policies import POLICIES, Counter, Draw, keep_set, select

LENGTHS = (20, 13, 5, 1, 0)


def real_tokens(left=False, length=20):
    mask = torch.arange(length) < torch.tensor(LENGTHS)[:, None]
    return mask.flip(1) if left else mask


def draw(left=False, causal=True, **more):
    real = real_tokens(left)
    return Draw(real, keep_set(real, causal=causal), **more)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("ratio", "count"), [(0.3, None), (0.05, None), (None, 4), (None, 16), (None, 100), (0.99, None)]
)
@pytest.mark.parametrize("policy", [p for p in POLICIES if p != "bernoulli"])
def test_a_selection_meets_its_budget(policy, ratio, count, causal, left):
    labelled = real_tokens(left) & (torch.arange(20) % 3 > 0)
    scores = torch.rand(len(LENGTHS), 20, generator=torch.Generator().manual_seed(0))
    given = draw(left, causal, labelled=labelled, scores=scores)
    least = 1 + causal
    found = select(given, ratio, count, policy, Counter(0), least)
    for b, length in enumerate(LENGTHS):
        chosen = found.positions[b][found.valid[b]].tolist()
        assert chosen == sorted(set(chosen))
        assert all(given.real[b, p] for p in chosen)
        assert all(p in chosen for p in given.keep[b].nonzero().flatten().tolist())
        wanted = min(length, max(least, count if count is not None else round(ratio * length)))
        if policy == "labelled":
            wanted = min(wanted, int((given.real[b] & (labelled[b] | given.keep[b])).sum()))
            assert all(labelled[b, p] or given.keep[b, p] for p in chosen)
        assert len(chosen) == wanted
        dummies = found.positions[b][~found.valid[b]].tolist()
        assert set(dummies) <= {chosen[0] if chosen else 0}
    assert found.positions.shape[1] == min(20, max(least, count if count is not None else round(ratio * 20)))


def test_suffix_and_score_take_the_last_and_the_highest():
    scores = -torch.arange(20.0).expand(len(LENGTHS), 20)
    last = select(draw(causal=False), None, 4, "suffix", Counter(0), 1)
    best = select(draw(causal=False, scores=scores), None, 4, "score", Counter(0), 1)
    assert last.positions[:2].tolist() == [[0, 17, 18, 19], [0, 10, 11, 12]]
    assert best.positions[:2].tolist() == [[0, 1, 2, 3]] * 2


def test_blocks_are_runs_of_tokens():
    real = torch.ones(64, 128, dtype=torch.bool)
    found = select(Draw(real, torch.zeros_like(real)), None, 48, "block", Counter(0), 0)
    for row in found.positions.tolist():
        runs = sum((place + 1) % 128 not in row for place in row)
        assert runs <= 3, row
    assert len({tuple(row) for row in found.positions.tolist()}) > 60


@pytest.mark.parametrize("policy", ["random", "block"])
def test_every_token_is_drawn_with_its_probability(policy):
    real = torch.arange(10) < torch.tensor([[10], [7]])
    given = Draw(real, keep_set(real, causal=True))
    counter = Counter(5)
    drawn = torch.zeros(2, 10)
    chance = torch.zeros(2, 10)
    for _ in range(2000):
        found = select(given, 0.4, None, policy, counter, 2)
        drawn.scatter_add_(1, found.positions, found.valid.float())
        for b in range(2):
            chance[b, found.positions[b][found.valid[b]]] = found.probability[b][found.valid[b]]
    # a share of 2000 draws has a standard deviation of at most 0.011
    torch.testing.assert_close(drawn / 2000, chance, atol=0.05, rtol=0)
    assert chance[0, 1] == pytest.approx(2 / 8)
    assert chance[1, 1] == pytest.approx(1 / 5)


@pytest.mark.parametrize("unequal", [False, True])
def test_bernoulli_draws_each_token_by_itself(unequal):
    real = torch.arange(12) < torch.tensor([[12], [8]])
    scores = 1 + torch.arange(12.0).expand(2, 12) if unequal else None
    given = Draw(real, torch.zeros_like(real), scores=scores)
    counter, drawn, sizes = Counter(1), torch.zeros(2, 12), []
    for _ in range(2000):
        found = select(given, 0.4, None, "bernoulli", counter, 0)
        drawn.scatter_add_(1, found.positions, found.valid.float())
        sizes.append(found.valid.sum(1))
    chance = torch.full((2, 12), 0.4).where(real, torch.tensor(0.0))
    if unequal:
        chance = policies.in_proportion(chance, scores, real).where(real, torch.tensor(0.0))
    torch.testing.assert_close(drawn / 2000, chance, atol=0.05, rtol=0)
    spread = torch.stack(sizes).float().var(0)
    torch.testing.assert_close(spread, (chance * (1 - chance)).sum(1), atol=0.25, rtol=0)


def test_bernoulli_cuts_no_token_that_is_kept(monkeypatch):
    monkeypatch.setattr(policies, "SPREAD", -4.5)  # room for fewer tokens than are drawn
    real = torch.ones(8, 40, dtype=torch.bool)
    keep = policies.keep_set(real, causal=True)
    for seed in range(10):
        found = select(Draw(real, keep), 0.5, None, "bernoulli", Counter(seed), 2)
        assert (found.positions[:, 0] == 0).all() and (found.positions == 39).any(1).all()


def test_random_numbers_depend_on_seed_step_and_place_only():
    cpu = torch.device("cpu")
    first, again, other = Counter(3), Counter(3), Counter(4)
    a, b = first.uniform(4, 50, cpu), first.uniform(4, 50, cpu)
    assert torch.equal(a, again.uniform(4, 50, cpu))
    assert not torch.equal(a, b)
    assert not torch.equal(a, other.uniform(4, 50, cpu))
    assert torch.equal(Counter(3, 1).uniform(4, 50, cpu), b)
    many = Counter(9).uniform(100, 1000, cpu)
    assert 0 <= float(many.min()) < 1e-3
    assert 1 - 1e-3 < float(many.max()) < 1
    assert abs(float(many.mean()) - 0.5) < 0.003
    assert abs(float(torch.corrcoef(many[:2])[0, 1])) < 0.1
    assert abs(float(torch.corrcoef(torch.stack([many.flatten()[:-1], many.flatten()[1:]]))[0, 1])) < 0.01
    state = torch.get_rng_state()
    first.uniform(2, 2, cpu)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_loss_is_a_mean_over_selected_targets():
    logits = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([[1, 2, -100, 4, 5], [6, -100, -100, 3, 2]])
    selection = policies.Selection(
        torch.tensor([[0, 2, 3], [1, 3, 1]]),
        torch.tensor([[True, True, True], [True, True, False]]),
        torch.tensor([[1.0, 0.5, 0.5], [0.25, 0.25, 0.25]], dtype=torch.float64),
    )
    # selected and not ignored: (0, 0) of target 1, (0, 2) of 4, (1, 1) of 3; there are 7 targets in all
    each = [F.cross_entropy(logits[b, i][None], torch.tensor([t])) for b, i, t in ((0, 0, 1), (0, 2, 4), (1, 1, 3))]
    found = token_loss(logits, targets, selection, by_chance=False)
    torch.testing.assert_close(found, sum(each) / 3)
    found = token_loss(logits, targets, selection, by_chance=True)
    torch.testing.assert_close(found, (each[0] + 2 * each[1] + 4 * each[2]) / 7)
    for items in (14, torch.tensor(14)):
        found = token_loss(logits, targets, selection, by_chance=False, items=items)
        torch.testing.assert_close(found, sum(each) / 3 * 7 / 14)
        found = token_loss(logits, targets, selection, by_chance=True, items=items)
        torch.testing.assert_close(found, (each[0] + 2 * each[1] + 4 * each[2]) / 14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_of_half_precision_is_that_of_its_logits_in_float32(dtype):
    selection = policies.Selection(torch.arange(3)[None], torch.ones(1, 3, dtype=torch.bool), torch.full((1, 3), 0.5))
    logits, targets = torch.randn(1, 3, 7).to(dtype), torch.tensor([[1, 2, 6]])
    for by_chance in (False, True):
        found = token_loss(logits, targets, selection, by_chance=by_chance)
        assert torch.equal(found, token_loss(logits.float(), targets, selection, by_chance=by_chance))


@pytest.mark.parametrize("by_chance", [False, True])
@pytest.mark.parametrize("count", [0, 2])
def test_no_target_is_a_loss_of_zero_in_the_graph(by_chance, count):
    logits = torch.randn(1, count, 7, requires_grad=True)
    selection = policies.Selection(
        torch.zeros(1, count, dtype=torch.long), torch.ones(1, count, dtype=torch.bool), torch.ones(1, count)
    )
    loss = token_loss(logits, torch.full((1, 3), -100), selection, by_chance=by_chance)
    loss.backward()
    assert loss == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_targets_are_shifted_before_anything_is_selected():
    labels = torch.tensor([[5, 6, -100, 8]])
    assert targets_of(labels, None, shifts=True).tolist() == [[6, -100, 8, -100]]
    assert targets_of(labels, None, shifts=False) is labels
    shifted = labels.flip(1)
    assert targets_of(None, shifted, shifts=True) is shifted
