"""WtaCrs: weight gradients that are right in the mean, from a part of the rows."""

import copy
import logging
import math

import models
import pytest
import torch
import transformers as hf
from checks.state import gradients
from torch import nn

import tightfit
from tightfit import Checkpointing, FusedOps, Lora, Mesa, PartialEmbedding, WtaCrs
from tightfit.core.errors import ConflictError, SelectorError
from tightfit.core.memory import saved_bytes
from tightfit.core.simulate import simulate
from tightfit.methods.wta_crs import AUTO_EVERY, Sampling
from tightfit.ops.linear import linear
from tightfit.ops.rows import FLOOR, Cached, Rows, Running, attention_masks, kept_rows, row_factor, sample_index

N, WIDTH, OUT = 64, 80, 24


def applied_to(family, *recipe, dtype=torch.float64, **options):
    stock = models.build(family, **options).to(dtype).train()
    return stock, tightfit.apply(copy.deepcopy(stock), list(recipe))


def heavy(generator, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def layer(codec, *, rows=N, seed=0):
    """(input, weight, gradient of the output) of a linear layer whose rows differ much in length, run once."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.exp(1.5 * heavy(generator, rows, 1))
    x = (heavy(generator, rows, WIDTH) * lengths).requires_grad_()
    weight = heavy(generator, OUT, WIDTH).requires_grad_()
    bias = heavy(generator, OUT).requires_grad_()
    pull = heavy(generator, rows, OUT) * torch.exp(heavy(generator, rows, 1))
    (linear(x, weight, bias, codec=codec) * pull).sum().backward()
    return x, weight, bias, pull


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


# -- models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "fused"), [(f, False) for f in models.FAMILIES] + [(f, True) for f in ("bert", "llama", "t5", "gpt2")]
)
def test_gradients_of_models_are_right_in_the_mean(family, fused):
    recipe = [FusedOps(loss=False), WtaCrs(min_rows=8)] if fused else [WtaCrs(min_rows=8)]
    stock, applied = applied_to(family, *recipe, dropout=0.0)
    batch = models.batch(stock, size=4, length=12)
    loss, wanted = gradients(stock, batch)
    draws, total, squares = 12, {}, 0
    for seed in range(draws):
        found_loss, found = gradients(applied.model, batch, seed=seed)
        assert torch.allclose(found_loss, loss, rtol=1e-6)
        squares += sum((found[n] - g).square().sum() for n, g in wanted.items())
        total = {n: total.get(n, 0) + g / draws for n, g in found.items()}
    sampled = sum((total[n] - g).square().sum() for n, g in wanted.items())
    assert sampled <= 1.8**2 * squares / draws**2
    assert squares > 0
    outside = [n for n in wanted if any(part in n.lower() for part in ("norm", "embed", "ln_", "wte"))]
    assert outside
    # fused root-mean-square norms compute in float64 what stock rounds to float32
    assert all(torch.allclose(found[n], wanted[n], rtol=1e-4, atol=1e-6) for n in outside)


def relative_error(found, wanted):
    return math.sqrt(sum(float((found[n] - g).square().sum()) for n, g in wanted.items())) / math.sqrt(
        sum(float(g.square().sum()) for g in wanted.values())
    )


def test_true_scores_halve_the_error_under_fused_ops():
    config = hf.BertConfig(
        hidden_size=96, num_hidden_layers=3, num_attention_heads=4, intermediate_size=384, vocab_size=200,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    stock = hf.BertForSequenceClassification(config).train()
    batch = {"input_ids": torch.randint(5, 200, (16, 64)), "labels": torch.randint(0, 2, (16,))}
    _, wanted = gradients(stock, batch)
    wanted = {n: g for n, g in wanted.items() if "encoder" in n and n.endswith("weight") and "Norm" not in n}
    errors = []
    for recipe in ([WtaCrs()], [FusedOps(), WtaCrs()]):
        applied = tightfit.apply(copy.deepcopy(stock), recipe)
        draws = []
        for seed in range(5):
            draws.append(relative_error(gradients(applied.model, batch, seed=seed)[1], wanted))
        errors.append(sum(draws) / 5)
    assert errors[1] <= 0.5 * errors[0]


@pytest.mark.parametrize(
    "others",
    [(Lora(rank=64),), (Checkpointing(),), (Mesa(),), (FusedOps(), Mesa()), (FusedOps(), Checkpointing()), "partial"],
    ids=lambda o: o if isinstance(o, str) else "+".join(t.name for t in o),
)
@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_recipes(family, others):
    stock = models.build(family)
    others = (PartialEmbedding(ids=models.kept_ids(stock), force=True),) if others == "partial" else others
    applied = tightfit.apply(copy.deepcopy(stock), [*others, WtaCrs(min_rows=8)])
    batches = [models.batch(stock, size=4, length=12, seed=seed) for seed in range(2)]
    runs = []
    for _ in range(2):
        loss, grads = gradients(applied.model, *batches)
        assert torch.isfinite(loss)
        assert grads and all(torch.isfinite(g).all() for g in grads.values())
        runs.append(grads)
    assert all(torch.equal(g, runs[1][n]) for n, g in runs[0].items())
    twin = copy.deepcopy(applied.model)
    assert all(torch.equal(g, runs[0][n]) for n, g in gradients(twin, *batches)[1].items())


@pytest.mark.parametrize("family", ["llama", "gpt2"], ids=["head of its own", "head of the embeddings"])
@pytest.mark.parametrize("others", ["stock loss", "chunked loss", "reduced vocabulary"])
def test_the_head_of_a_language_model_is_sampled_too(family, others, monkeypatch):
    monkeypatch.setattr(Rows, "least", 1)  # the models here are narrow
    stock = models.build(family, dropout=0.0).double().train()
    reduced = PartialEmbedding(ids=models.kept_ids(stock), force=True)
    recipe = {"stock loss": [], "chunked loss": [FusedOps()], "reduced vocabulary": [reduced]}[others]
    exact = tightfit.apply(copy.deepcopy(stock), recipe).model
    model = tightfit.apply(copy.deepcopy(stock), [*recipe, WtaCrs(where="lm_head", min_rows=8)]).model
    batch = models.batch(stock, size=4, length=12)
    name = next(n for n, p in exact.named_parameters() if p is exact.get_output_embeddings().weight)
    loss, wanted = gradients(exact, batch)
    draws, total, squares = 60, 0, 0
    for seed in range(draws):
        found_loss, found = gradients(model, batch, seed=seed)
        assert torch.allclose(found_loss, loss, rtol=1e-6)
        rest = [n for n in wanted if n != name]
        assert all(torch.allclose(found[n], wanted[n], rtol=1e-4, atol=1e-6) for n in rest)
        total, squares = total + found[name] / draws, squares + (found[name] - wanted[name]).square().sum()
    assert squares > 0
    assert (total - wanted[name]).norm() <= 2 * (squares / draws**2).sqrt()


def test_where_it_samples_by_default():
    llama = models.build("llama")
    linears = sum(isinstance(m, nn.Linear) for m in llama.modules())
    assert tightfit.apply(copy.deepcopy(llama), WtaCrs()).report()["methods"]["WtaCrs"]["layers"] == linears
    # the chunked loss does not tell how noisy it is
    assert tightfit.apply(llama, WtaCrs(budget="auto")).report()["methods"]["WtaCrs"]["layers"] == linears - 1
    bert = models.build("bert")
    inside = sum(isinstance(m, nn.Linear) for m in bert.bert.encoder.modules())
    assert tightfit.apply(bert, WtaCrs()).report()["methods"]["WtaCrs"]["layers"] == inside


def test_checkpointing_draws_the_same_sample_again():
    stock, plain = applied_to("llama", WtaCrs(min_rows=8), dropout=0.0)
    again = tightfit.apply(copy.deepcopy(stock), [WtaCrs(min_rows=8), Checkpointing()])
    batch = models.batch(stock, size=4, length=12)
    found = []
    for applied in (plain, again):
        found.append(gradients(applied.model, batch)[1])
    assert all(torch.allclose(g, found[1][n], rtol=1e-9, atol=1e-12) for n, g in found[0].items())


def test_a_layer_called_twice_before_backward():
    codec, weight = Rows(0.9, min_rows=1), torch.randn(OUT, WIDTH, dtype=torch.float64, requires_grad=True)
    parts = [heavy(torch.Generator().manual_seed(s), N, WIDTH) for s in (1, 2)]
    torch.manual_seed(0)
    sum(linear(x, weight, codec=codec).sum() for x in parts).backward()
    both = weight.grad.clone()
    weight.grad = None
    torch.manual_seed(0)
    for x in parts:
        linear(x, weight, codec=codec).sum().backward()
    assert torch.allclose(both, weight.grad, rtol=1e-12)


def test_autocast_gives_gradients_of_the_parameters_type():
    stock, applied = applied_to("bert", WtaCrs(min_rows=8), dtype=torch.float32, dropout=0.0)
    batch = models.batch(stock, size=4, length=12)
    loss, grads = gradients(applied.model, batch, autocast=True)
    wanted_loss, _ = gradients(stock, batch, autocast=True)
    assert torch.equal(loss, wanted_loss)
    assert all(g.dtype == torch.float32 and torch.isfinite(g).all() for g in grads.values())


def test_eval_and_frozen_layers_are_stock():
    stock, applied = applied_to("bert", WtaCrs(), dtype=torch.float32, dropout=0.0)
    batch = models.batch(stock, size=4, length=24)
    (_, found), (_, wanted) = gradients(applied.model.eval(), batch), gradients(stock.eval(), batch)
    assert all(torch.equal(g, wanted[n]) for n, g in found.items())


@pytest.mark.parametrize(
    "recipe", [(WtaCrs(),), (FusedOps(), WtaCrs()), (Mesa(), WtaCrs())], ids=["alone", "fused", "mesa"]
)
@pytest.mark.parametrize("family", ["bert", *(pytest.param(f, marks=pytest.mark.slow) for f in ("llama", "t5"))])
def test_planned_bytes_are_kept_bytes(family, recipe):
    stock, applied = applied_to(family, *recipe, dtype=torch.float32)
    batch = models.batch(stock, size=4, length=24)
    assert simulate(applied.model, batch).saved_bytes == saved_bytes(lambda: applied.model(**batch).loss.backward())


# -- the budget ---------------------------------------------------------------------------------------------------


def test_an_automatic_budget_follows_the_noise(caplog):
    stock, applied = applied_to("bert", WtaCrs(budget="auto", noise=0.05, min_rows=1), dtype=torch.float32, dropout=0.0)
    optimizer = applied.optimizer(torch.optim.SGD, lr=0.0)
    batch = models.batch(stock, size=4, length=24)
    with caplog.at_level(logging.INFO, "tightfit.methods.wta_crs"):
        for _ in range(8 * AUTO_EVERY):
            applied.model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    low, high = applied.part(Sampling).report()["budget"]
    assert high > 0.9 >= 0.3 <= low
    assert "samples 0.38 of the rows" in caplog.text
    part = applied.part(Sampling)
    state = part.tensors()
    for codec in part.codecs.values():
        codec.budget = 0.3
    part.load_tensors(state)
    assert part.report()["budget"] == (low, high)


@pytest.mark.parametrize(
    ("budget", "noise", "after"),
    [
        (0.4, 0.6, 0.5),
        (0.4, 0.4, 0.4),
        (0.4, 0.2, 0.32),
        (0.9, 0.6, 1.0),
        (0.3, 0.2, 0.3),
        (0.32, 0.2, 0.3),
        (0.4, None, 0.4),
    ],
)
def test_an_automatic_budget_rises_above_the_noise_and_falls_below_half_of_it(budget, noise, after):
    part = Sampling(WtaCrs(budget="auto", noise=0.5))
    codec = part.add("layer", None)["codec"]
    codec.budget, codec.noise = budget, None if noise is None else torch.tensor([noise**2 * 9, 9.0])
    for _ in range(AUTO_EVERY - 1):
        part.after_step()
        assert codec.budget == budget
    part.after_step()
    assert codec.budget == pytest.approx(after)


def test_an_automatic_budget_counts_each_step_once_and_on_from_a_checkpoint():
    def fresh():
        return applied_to("bert", WtaCrs(budget="auto", noise=0.05, min_rows=1), dtype=torch.float32, dropout=0.0)

    def budgets(applied):
        return [float(value) for key, value in applied.state_dict().items() if key.endswith("/budget")]

    stock, applied = fresh()
    batch = models.batch(stock, size=4, length=24)
    for part in (1, 2):
        optimizer = applied.optimizer(torch.optim.SGD, lr=0.0)
        applied.adopt(optimizer)
        for _ in range(AUTO_EVERY // 2):
            assert set(budgets(applied)) == {0.3}
            applied.model(**batch).loss.backward()
            optimizer.step()
        if part == 1:
            state = applied.state_dict()
            _, applied = fresh()
            applied.load_state_dict(state)
    assert max(budgets(applied)) > 0.3


# -- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"budget": 0.0}, ValueError, r"budget.*0"),
        ({"budget": 1.1}, ValueError, r"budget.*1\.1"),
        ({"budget": "most"}, ValueError, r"budget.*auto"),
        ({"budget": None}, TypeError, "budget"),
        ({"mode": "crs"}, ValueError, r"mode.*pps.*wta"),
        ({"scores": "true"}, ValueError, r"scores.*running"),
        ({"scores": "cache"}, ValueError, "number of training examples"),
        ({"examples": 4}, ValueError, "take none"),
        ({"min_rows": 0}, ValueError, "min_rows"),
        ({"noise": 0}, ValueError, "noise"),
        ({"where": ""}, ValueError, "where"),
    ],
)
def test_bad_fields(fields, error, text):
    with pytest.raises(error, match=text):
        WtaCrs(**fields)


def test_bad_places():
    with pytest.raises(SelectorError, match=r"querry.*query"):
        tightfit.apply(models.build("bert"), WtaCrs(where="querry"))
    with pytest.raises(SelectorError, match="trains"):
        tightfit.apply(models.build("bert").requires_grad_(False), WtaCrs())
    with pytest.raises(ConflictError, match=r"Velora and WtaCrs"):
        tightfit.apply(models.build("bert"), [WtaCrs(), tightfit.Velora(groups=4, where="query")])
    both = [WtaCrs(where="key"), tightfit.Velora(groups=4, where="query")]
    tightfit.apply(models.build("bert"), both).remove()


@pytest.mark.parametrize(
    "recipe",
    [WtaCrs(min_rows=4, scores="running"), WtaCrs(min_rows=4, scores="cache", examples=8), WtaCrs(budget="auto")],
    ids=["running", "cache", "auto"],
)
def test_what_was_seen_is_saved_and_loaded(recipe, tmp_path):
    def fresh():
        torch.manual_seed(0)
        config = hf.BertConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
        return hf.BertForSequenceClassification(config).train()

    def step(applied):
        batch = {"input_ids": torch.arange(32).view(4, 8) + 5, "labels": torch.arange(4) % 2}
        index = {"sample_index": torch.arange(4)} if recipe.scores == "cache" else {}
        applied.model(**batch, **index).loss.backward()

    begun, trained = tightfit.apply(fresh(), recipe), tightfit.apply(fresh(), recipe)
    step(trained)
    begun.save(tmp_path / "begun")
    trained.save(tmp_path / "trained")
    assert tightfit.load(fresh(), tmp_path / "begun").state_dict().keys() == begun.state_dict().keys()
    again = tightfit.load(fresh(), tmp_path / "trained")
    seen = [key for key in trained.state_dict() if not key.endswith(("/budget", "/steps"))]
    assert seen and not set(seen) & set(begun.state_dict())
    assert set(again.state_dict()) == set(trained.state_dict())
    for key in seen:
        assert torch.equal(again.state_dict()[key].nan_to_num(), trained.state_dict()[key].nan_to_num())
    step(again)


def test_layers_with_a_forward_of_their_own_are_named():
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 99}
    model = hf.FalconForSequenceClassification(hf.FalconConfig(**size))
    with pytest.raises(tightfit.SelectorError, match=r"WtaCrs: its 8 layers .* have a forward of their own"):
        tightfit.apply(model, WtaCrs())
    tightfit.apply(model, tightfit.chain(WtaCrs(), tightfit.Lora(rank=2)))
