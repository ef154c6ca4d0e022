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
from wta_crs_cases import OUT, WIDTH, N, applied_to, heavy

import tightfit
from tightfit import Checkpointing, FusedOps, Lora, Mesa, PartialEmbedding, WtaCrs
from tightfit.core.errors import ConflictError, SelectorError
from tightfit.core.memory import saved_bytes
from tightfit.core.simulate import simulate
from tightfit.methods.wta_crs import AUTO_EVERY, Sampling
from tightfit.ops.linear import linear
from tightfit.ops.rows import Rows

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
