"""Selection, the sum of selected rows, and row-wise AdamW against plain references."""

import numpy as np
import pytest
import torch

from tightfit.ops.sparse_rows import (
    AdamW,
    Workspace,
    resident,
    row_adamw,
    select,
    sparse_rows,
    top_rows,
    top_rows_of_groups,
)
from tightfit.ops.sparse_rows import reference as ref


def chosen_of(rows, scores, width):
    chosen = torch.zeros(len(rows), width, dtype=torch.bool)
    chosen.scatter_(1, rows, scores > 0)
    return chosen


@pytest.mark.parametrize("tokens", [1, 17])
@pytest.mark.parametrize(("width", "k"), [(5, 5), (123, 7), (64, 64)])
@pytest.mark.parametrize("block", [1, 2**24])
def test_each_token_gets_its_rows_of_largest_score(tokens, width, k, block, monkeypatch):
    monkeypatch.setattr(select, "BLOCK_BYTES", block)  # one row after another, or all at once
    q, keys = torch.randn(tokens, 6, dtype=torch.float64), torch.randn(width, 6, dtype=torch.float64)
    rows, scores = top_rows(q, keys, k, Workspace())
    assert rows.shape == scores.shape == (tokens, k)
    assert torch.equal(chosen_of(rows, scores, width), ref.top_rows(q, keys, k))
    torch.testing.assert_close(scores, (q @ keys.t()).gather(1, rows), rtol=1e-12, atol=1e-12)


def test_groups_hide_the_rows_of_all_others():
    q, keys, router = torch.randn(9, 6).double(), torch.randn(48, 6).double(), torch.randn(8, 6).double()
    logits = q @ router.t()
    rows, scores = top_rows_of_groups(q, keys, 5, logits, 2, Workspace())
    assert torch.equal(chosen_of(rows, scores, 48), ref.top_rows_of_groups(q, keys, 5, logits, 2))
    rows, scores = top_rows_of_groups(q, keys, 5, logits, 8, Workspace())
    assert torch.equal(chosen_of(rows, scores, 48), ref.top_rows(q, keys, 5))


def test_bfloat16_keys_are_scored_in_float32():
    q, keys = torch.randn(4, 8), torch.randn(20, 8).bfloat16()
    rows, scores = top_rows(q, keys, 3, Workspace())
    torch.testing.assert_close(scores, (q @ keys.float().t()).gather(1, rows), rtol=0, atol=0)


@pytest.mark.parametrize("width", [40, 400])
def test_the_cap_keeps_rows_of_largest_summed_score(width):
    q, keys = torch.randn(30, 6).double(), torch.randn(width, 6).double()
    rows, scores = top_rows(q, keys, 8, Workspace())
    whole, found = resident(rows, scores, None, width, width), resident(rows, scores, None, width, 20)
    assert len(found.rows) == 20 < found.wanted == whole.wanted == len(whole.rows)
    before = ref.top_rows(q, keys, 8)
    kept = ref.capped(before, q @ keys.t(), 20)
    assert found.rows.tolist() == kept.any(0).nonzero().flatten().tolist()
    after = torch.zeros(30, width, dtype=torch.bool)
    for token in range(30):
        places = found.places[token]
        after[token, found.rows[places[places >= 0]]] = True
    assert torch.equal(after, kept)
    mass = (q @ keys.t()).where(before, 0.0).sum()
    lost = (q @ keys.t()).where(before & ~kept, 0.0).sum()
    assert found.dropped == pytest.approx(float(lost / mass), rel=1e-12)
    assert whole.dropped == 0 and whole.rows.tolist() == sorted(whole.rows.tolist())


def test_tokens_without_a_say_and_scores_that_are_not_positive():
    rows, scores = torch.tensor([[3, 1], [2, 0]]), torch.tensor([[1.0, -1.0], [5.0, float("nan")]])
    assert resident(rows, scores, None, 9, 4).rows.tolist() == [2, 3]
    found = resident(rows, scores, np.array([True, False]), 9, 4)
    assert found.rows.tolist() == [3] and found.places.tolist() == [[0, -1], [-1, -1]]
    none = resident(rows, -scores.abs(), None, 9, 4)
    assert none.rows.tolist() == [] and none.dropped == 0 and (none.places == -1).all()


def example(dtype=torch.float64, tokens=11, width=30, size=6, k=4):
    h, slot = torch.randn(tokens, size, dtype=dtype), torch.randn(width, 2, size, dtype=dtype)
    rows, scores = top_rows(h, slot[:, 0], k, Workspace())
    found = resident(rows, scores, None, width, width)
    return h, slot, torch.from_numpy(found.places), ref.top_rows(h, slot[:, 0], k), rows


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("refetch", [False, True])
def test_output_and_all_gradients_are_those_of_a_dense_layer_with_a_mask(scale, gated, refetch):
    h, slot, places, chosen, rows = example()
    gate = torch.rand(len(h), places.shape[1], dtype=torch.float64) if gated else None
    pull = torch.randn_like(h)
    keys, values = slot[:, 0].clone().requires_grad_(), slot[:, 1].clone().requires_grad_()
    dense_h = h.clone().requires_grad_()
    dense_gate = None
    if gated:
        dense_gate = torch.zeros_like(chosen, dtype=torch.float64).scatter_(1, rows, gate).requires_grad_()
        gate.requires_grad_()
    expected = ref.sparse_rows(dense_h, keys, values, chosen, scale, dense_gate)
    expected.backward(pull)
    taken = []
    own, link = h.clone().requires_grad_(), torch.zeros(1, requires_grad=True)
    again = slot.clone if refetch else None
    out = sparse_rows(own, slot, places, scale=scale, gate=gate, link=link, sink=taken.append, again=again)
    out.backward(pull)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(own.grad, dense_h.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(taken[0][:, 0], keys.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(taken[0][:, 1], values.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(link.grad, taken[0].norm().float()[None])
    if gated:
        live = places >= 0
        torch.testing.assert_close(
            gate.grad.where(live, 0.0), dense_gate.grad.gather(1, rows).where(live, 0.0), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_rows_for_every_token_is_the_dense_layer_bit_for_bit(dtype):
    h, keys, values = (torch.randn(n, 64).to(dtype) for n in (33, 200, 200))
    slot = torch.stack([keys, values], dim=1)
    dense = torch.relu(h @ keys.t()) @ values
    assert torch.equal(sparse_rows(h, slot, None), dense)
    own = h.double().requires_grad_()
    taken = []
    sparse_rows(own, slot.double(), None, sink=taken.append).sum().backward()
    wide = [t.double().requires_grad_() for t in (h, keys, values)]
    ref.sparse_rows(*wide, torch.ones(33, 200, dtype=torch.bool)).sum().backward()
    for found, expected in zip((own.grad, taken[0][:, 0], taken[0][:, 1]), wide):
        torch.testing.assert_close(found, expected.grad, rtol=1e-11, atol=1e-11)
    rows, scores = top_rows(h.float(), keys.float(), 200, Workspace())
    places = torch.from_numpy(resident(rows, scores, None, 200, 200).places)
    per_token = sparse_rows(h.float(), slot.float(), places)
    torch.testing.assert_close(
        per_token, torch.relu(h.float() @ keys.float().t()) @ values.float(), rtol=2e-5, atol=2e-5
    )


def test_second_derivatives_are_refused():
    h, slot, places, _, _ = example()
    h.requires_grad_()
    with pytest.raises(RuntimeError, match="differentiated twice"):
        torch.autograd.grad(sparse_rows(h, slot, places).sum(), h, create_graph=True)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_row_adamw_is_the_reference_and_torchs_where_every_row_is_touched(decay, monkeypatch):
    settings = AdamW((0.8, 0.95), 1e-6, decay)
    ours = [torch.randn(20, 7).double() for _ in range(2)] + [torch.zeros(20, 7).double() for _ in range(2)]
    plain, steps, other = [t.clone() for t in ours], np.zeros(20, np.int32), torch.zeros(20)
    for turn in range(5):
        touched = np.flatnonzero(np.random.default_rng(turn).random(20) < 0.4)
        grad = torch.randn(20, 7).double()
        ours[1][touched], plain[1][touched] = grad[touched], 0.5 * grad[touched]
        before = [ours[i].clone() for i in (0, 2, 3)]
        row_adamw(*ours, steps, touched, 0.01, settings, Workspace(), factor=0.5)
        ref.row_adamw(*plain, other, touched.tolist(), 0.01, settings.betas, settings.eps, decay)
        rest = np.setdiff1d(np.arange(20), touched)
        assert all(torch.equal(ours[i][rest], old[rest]) for i, old in zip((0, 2, 3), before))
        assert not ours[1][touched].any()
    for i in (0, 2, 3):
        torch.testing.assert_close(ours[i], plain[i], rtol=1e-12, atol=1e-12)
    assert steps.tolist() == other.int().tolist()
    parameter = torch.nn.Parameter(torch.randn(6, 4).double())
    stock = torch.optim.AdamW([parameter], lr=0.01, betas=settings.betas, eps=settings.eps, weight_decay=decay)
    rows = [parameter.detach().clone(), *(torch.zeros(6, 4).double() for _ in range(3))]
    steps = np.zeros(6, np.int32)
    for _ in range(4):
        parameter.grad = torch.randn(6, 4).double()
        rows[1][:] = parameter.grad
        stock.step()
        row_adamw(*rows, steps, np.arange(6), 0.01, settings, Workspace())
    torch.testing.assert_close(rows[0], parameter.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_was_added_is_told(dtype):
    rows, wide = torch.randn(9, 4).to(dtype), torch.float64 if dtype == torch.float64 else torch.float32
    rest, told = [torch.randn(9, 4).abs().to(wide) for _ in range(3)], torch.zeros(9, 4, dtype=wide)
    before = rows.clone()
    steps, touched = np.zeros(9, np.int32), np.array([1, 2, 7])
    row_adamw(rows, *rest, steps, touched, 0.1, AdamW(), Workspace(), moved=lambda i, by: told.index_add_(0, i, by))
    torch.testing.assert_close(told, rows.to(wide) - before.to(wide), rtol=1e-12, atol=1e-12)
    assert (told[touched] != 0).all()


def test_bfloat16_rows_are_updated_in_float32():
    rows = torch.ones(3, 4).bfloat16()
    rest = [torch.zeros(3, 4) for _ in range(3)]
    rest[0][1] = 2.0
    row_adamw(rows, *rest, np.zeros(3, np.int32), np.array([1]), 0.25, AdamW(), Workspace())
    assert rows.float().tolist() == [[1.0] * 4, [0.75] * 4, [1.0] * 4]


def test_a_workspace_is_outside_of_the_allocator_and_used_again():
    work = Workspace()
    first = work.take("a", (4, 4), torch.float32)
    assert work.take("a", (2, 4), torch.bfloat16).data_ptr() == first.data_ptr()
    assert work.take("a", (0, 4), torch.float32).shape == (0, 4)
    held = work.nbytes
    assert work.take("a", (8, 8), torch.float64).data_ptr() != first.data_ptr() and work.nbytes > held
