"""WtaCrs on one layer, and the scores that its rows are drawn by."""

import models
import pytest
import torch
from torch import nn
from wta_crs_cases import OUT, WIDTH, N, applied_to, layer

import tightfit
from tightfit import WtaCrs
from tightfit.core.memory import saved_bytes
from tightfit.methods.wta_crs import Sampling
from tightfit.ops.linear import linear
from tightfit.ops.rows import FLOOR, Cached, Rows, Running, attention_masks, kept_rows, row_factor, sample_index

# -- one layer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["pps", "wta"])
def test_a_layers_weight_gradient_is_right_in_the_mean(mode):
    draws, total, squares = 400, 0, 0
    for seed in range(draws):
        torch.manual_seed(seed)
        x, weight, _, pull = layer(Rows(0.3, mode))
        exact = pull.t() @ x.detach()
        total, squares = total + weight.grad, squares + (weight.grad - exact).square().sum()
    # the mean of T draws is off by sqrt(V / T); 1.5 leaves room for 1,920 correlated entries
    assert (total / draws - exact).norm() <= 1.5 * (squares / draws**2).sqrt()
    assert squares > 0


def test_all_but_the_weight_gradient_is_exact():
    torch.manual_seed(0)
    (x, weight, bias, _), (x0, weight0, bias0, _) = layer(Rows(0.3)), layer(None)
    assert torch.equal(x.grad, x0.grad)
    assert torch.equal(bias.grad, bias0.grad)
    assert not torch.equal(weight.grad, weight0.grad)


@pytest.mark.parametrize("codec", [Rows(1.0), Rows(0.1, min_rows=N)], ids=["budget 1", "few rows"])
def test_all_rows_give_the_exact_gradient(codec):
    assert torch.equal(layer(codec)[1].grad, layer(None)[1].grad)


@pytest.mark.parametrize("inner", [False, True], ids=["rows", "rows in 8 bits"])
def test_kept_bytes_are_those_predicted(inner):
    from tightfit.ops.affine import Affine

    codec = Rows(0.3)
    codec.inner = Affine() if inner else None
    x, weight = torch.randn(4, 32, 256), nn.Parameter(torch.randn(8, 256))
    assert saved_bytes(lambda: linear(x, weight, codec=codec).sum()) == codec.nbytes(x.shape, x.dtype)
    k = kept_rows(128, 0.3)
    assert codec.nbytes(x.shape, x.dtype) == k * (2 * 136 if inner else 1024) + 8 * k
    codec.budget = 1.0
    assert sum(t.nbytes for t in codec.encode(x)) == codec.nbytes(x.shape, x.dtype) == x.nbytes


def test_sampled_and_quantised_rows_give_nearly_the_gradient_of_sampled_ones():
    from tightfit.ops.affine import Affine

    found = []
    for inner in (None, Affine()):
        codec = Rows(0.3)
        codec.inner = inner
        torch.manual_seed(1)
        found.append(layer(codec)[1].grad)
    assert 0 < (found[0] - found[1]).norm() < 0.02 * found[0].norm()


def test_siblings_share_one_sample_and_the_same_seed_gives_the_same():
    x = torch.randn(4, 32, 256)
    weights = [nn.Parameter(torch.randn(8, 256)) for _ in range(3)]
    codecs = [Rows(0.3) for _ in weights]

    def step():
        y = x + 0
        return sum(linear(y, w, codec=c).sum() for w, c in zip(weights, codecs))

    assert saved_bytes(step) == codecs[0].nbytes(x.shape, x.dtype)
    grads = []
    for _ in range(2):
        torch.manual_seed(7)
        step().backward()
        grads.append([w.grad for w in weights])
        for w in weights:
            w.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.parametrize(
    ("other", "shared"),
    [
        (Rows(0.3), True),
        (Rows(0.3, scores=Running()), False),
        (Rows(0.4), False),
        (Rows(0.3, "wta"), False),
        (Rows(0.3, min_rows=17), False),
    ],
)
def test_only_layers_that_sample_alike_share_a_sample(other, shared):
    assert Rows(0.3).shares_with(other) is shared


def test_row_lengths_of_siblings_are_those_of_the_input_as_it_is():
    x, codec = torch.randn(N, WIDTH), Rows(0.3)
    known = codec.note(x)
    assert codec.note(x.view(4, -1, WIDTH).view(N, WIDTH)) is known
    x.mul_(2)
    assert torch.equal(codec.note(x), 2 * known)


def test_the_noise_is_the_spread_of_the_estimates():
    found, squares = [], 0
    for seed in range(200):
        torch.manual_seed(seed)
        codec = Rows(0.3, watch=True)
        x, weight, _, pull = layer(codec)
        found.append(codec.noise)
        torch.testing.assert_close(codec.noise[1], weight.grad.float().square().sum())
        squares += (weight.grad - pull.t() @ x.detach()).square().sum() / 200
    # systematic draws are a little better than the independent ones that the formula is for
    assert 0.8 * squares < torch.stack(found)[:, 0].mean() < 1.3 * squares
    torch.manual_seed(1)
    codec.noise = found[0]
    layer(codec)
    torch.testing.assert_close(codec.noise, 0.9 * found[0] + 0.1 * found[1])


def test_a_nan_in_the_input_reaches_the_gradient():
    x, weight = torch.randn(N, WIDTH), torch.randn(OUT, WIDTH, requires_grad=True)
    x[40, 3] = torch.nan
    linear(x, weight, codec=Rows(0.3)).nansum().backward()
    assert weight.grad[:, 3].isnan().all()


def test_bad_tensors():
    weight = torch.randn(OUT, WIDTH, requires_grad=True)
    with pytest.raises(TypeError, match="int64"):
        linear(torch.ones(4, WIDTH, dtype=torch.int64), weight, codec=Rows(0.3))
    assert linear(torch.zeros(0, WIDTH), weight, codec=Rows(0.3)).shape == (0, OUT)
    y = linear(torch.randn(N, WIDTH), weight, codec=Rows(0.3)).square().sum()
    with pytest.raises(RuntimeError, match="twice"):
        torch.autograd.grad(y, weight, create_graph=True)


# -- scores -------------------------------------------------------------------------------------------------------


def test_padding_is_told_to_the_layers_and_hardly_drawn():
    keys = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]).bool()
    square = keys[:, None, None, :].expand(2, 1, 4, 4)
    additive = torch.zeros(2, 1, 4, 4).masked_fill(~square, torch.finfo(torch.float32).min)
    flat = additive[:, 0, 0]
    four = (square, square.long(), additive, additive + torch.randn(2, 1, 1, 1))
    for mask in (keys, keys.long(), keys.float(), flat, flat.clamp(min=-1e4), *four):
        with attention_masks(None, mask):
            assert torch.equal(row_factor((2, 4, 8)), torch.where(keys, 1.0, FLOOR).view(-1))
            assert row_factor((2, 5, 8)) is None and row_factor((8, 8)) is None
    assert row_factor((2, 4, 8)) is None
    with attention_masks(torch.zeros(2, 4)):  # nothing added anywhere
        assert torch.equal(row_factor((2, 4, 8)), torch.ones(8))


def test_a_mask_that_was_written_to_is_looked_at_again():
    mask = torch.ones(1, 3, dtype=torch.long)
    for last in (1.0, FLOOR):
        with attention_masks(mask):
            assert row_factor((1, 3, 8))[2] == pytest.approx(last)
        mask[0, 2] = 0


@pytest.mark.parametrize("family", models.FAMILIES)
def test_masked_rows_are_left_out_in_every_model(family, monkeypatch):
    seen = []
    stock, applied = applied_to(family, WtaCrs(min_rows=1), dtype=torch.float32)
    monkeypatch.setattr("tightfit.ops.rows.codec.sample_rows", lambda scores, k, mode: seen.append(scores) or _first(k))
    batch = models.batch(stock, size=4, length=24)
    applied.model(**batch)
    valid = batch["attention_mask"].view(-1) > 0
    inside = [scores for scores in seen if scores.shape == valid.shape]
    assert inside
    assert all(scores[~valid].max() < 0.02 * scores[valid].median() for scores in inside)


def _first(k):
    from tightfit.ops.rows import Sample

    return Sample(torch.arange(k), torch.ones(k))


def test_running_scores_learn_positions_at_any_length():
    scores = Running(decay=0.75)
    like = torch.ones(6)
    assert torch.equal(scores.expected((2, 3, 8), like), like)
    scores.observe(torch.tensor([1.0, 2.0, 3.0, 3.0, 4.0, 5.0]), (2, 3, 8))
    assert scores.expected((2, 3, 8), like).tolist() == [2, 3, 4, 2, 3, 4]
    assert scores.expected((1, 5, 8), torch.ones(5)).tolist() == [2, 3, 4, 3, 3]  # unseen: the mean
    scores.observe(torch.tensor([4.0, 5.0]), (1, 2, 8))
    assert scores.expected((1, 3, 8), torch.ones(3)).tolist() == [2.5, 3.5, 4]
    scores.observe(torch.tensor([torch.inf, torch.nan, -torch.inf]), (1, 3, 8))
    assert scores.expected((1, 3, 8), torch.ones(3)).tolist() == [2.5, 3.5, 4]  # an overflow tells nothing
    scores.observe(torch.zeros(3), (1, 3, 8))
    assert scores.expected((1, 3, 8), torch.ones(3)).min() > 0
    again = Running()
    again.load(scores.tensors())
    assert torch.equal(again.mean, scores.mean)


def test_running_scores_lower_the_noise_where_positions_differ():
    errors = {}
    for kind in (None, Running):
        codec, total = Rows(0.2, min_rows=1, scores=kind and kind()), 0
        for seed in range(60):
            torch.manual_seed(seed)
            x, weight = torch.randn(8, 16, WIDTH), torch.zeros(OUT, WIDTH, requires_grad=True)
            pull = torch.randn(8, 16, OUT) * torch.linspace(-4, 4, 16).exp().view(16, 1)
            (linear(x, weight, codec=codec) * pull).sum().backward()
            total += (weight.grad - pull.view(-1, OUT).t() @ x.view(-1, WIDTH)).norm() * (seed >= 10)
        errors[kind] = total
    assert errors[Running] < 0.5 * errors[None]


def test_cached_scores_know_examples():
    scores, like = Cached(5), torch.ones(4)
    with pytest.raises(RuntimeError, match=r"sample_index.*running"):
        scores.expected((2, 2, 8), like)
    index = torch.tensor([3, 1])
    with sample_index(index):
        assert scores.expected((2, 2, 8), like).tolist() == [1, 1, 1, 1]
        scores.observe(torch.tensor([1.0, 2.0, 4.0, 8.0]), (2, 2, 8), index)
        assert scores.expected((2, 2, 8), like).tolist() == [1, 2, 4, 8]
    with sample_index(torch.tensor([1, 0])):
        assert scores.expected((2, 2, 8), like).tolist() == [4, 8, 6, 6]  # unseen: the mean of those at hand
        with pytest.raises(RuntimeError, match=r"2 positions.*3.*running"):
            scores.expected((2, 3, 8), torch.ones(6))
        kept = {name: tensor.clone() for name, tensor in scores.tensors().items()}
        scores.observe(torch.tensor([0.0, 1.0, 1.0, 1.0]), (2, 2, 8), torch.tensor([1, 0]))
        assert scores.expected((2, 2, 8), like).min() > 0
        scores.load(kept)
        again = Cached(5)
        again.load(kept)
        again.observe(torch.ones(4), (2, 2, 8), index)
        assert torch.equal(kept["lengths"].nan_to_num(), scores.tensors()["lengths"].nan_to_num())


def test_an_overflow_under_a_loss_scale_leaves_no_trace_in_cached_scores():
    torch.manual_seed(0)
    model = models.build("bert")
    applied = tightfit.apply(model, WtaCrs(scores="cache", examples=4, min_rows=1))
    batch = models.batch(model, size=2, length=8) | {"sample_index": torch.tensor([2, 0])}

    def tables():
        found = [codec.scores.lengths for codec in applied.part(Sampling).codecs.values()]
        return [table.clone() for table in found if table is not None]

    for scale in (torch.inf, 1.0):
        (model(**batch).loss * scale).backward()
        assert all(table[[1, 3]].isnan().all() for table in tables())
    learnt = tables()
    assert all(table[[0, 2]].isfinite().all() for table in learnt)
    (model(**batch).loss * torch.inf).backward()
    assert all(torch.equal(a[[0, 2]], b[[0, 2]]) for a, b in zip(learnt, tables(), strict=True))


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ([2, 0], r"got \[2, 0\], accepted is \(B,\) int64"),
        (torch.tensor([2.0, 0.0]), r"shape \(2,\) of torch.float32"),
        (torch.tensor([2, 0, 1]), r"shape \(3,\) of torch.int64, accepted is \(B,\)"),
        (torch.tensor([2, 4]), r"got 4, accepted is \[0, 3\].*4 examples"),
        (torch.tensor([-1, 0]), r"got -1, accepted is \[0, 3\]"),
    ],
)
def test_indices_that_name_no_examples_are_refused(index, said):
    model = models.build("bert")
    tightfit.apply(model, WtaCrs(scores="cache", examples=4))
    with pytest.raises(ValueError, match=f"sample_index: .*{said}"):
        model(**models.batch(model, size=2, length=8), sample_index=index)


def test_cached_scores_in_a_model():
    stock, applied = applied_to("bert", WtaCrs(scores="cache", examples=4, min_rows=1), dtype=torch.float32)
    batch = models.batch(stock, size=2, length=8)
    with pytest.raises(RuntimeError, match="sample_index"):
        applied.model(**batch)
    applied.model(**batch, sample_index=torch.tensor([2, 0])).loss.backward()
    codecs = applied.part(Sampling).codecs
    # siblings share the table of the first
    tables = [codec.scores.lengths for codec in codecs.values() if codec.scores.lengths is not None]
    assert 0 < len(tables) < len(codecs)
    assert all((~t.isnan()).any(dim=1).tolist() == [True, False, True, False] for t in tables)
    assert applied.part(Sampling).host_bytes() == len(tables) * 4 * 8 * 2
    assert applied.model.eval()(**batch).logits.shape == (2, stock.config.num_labels)
