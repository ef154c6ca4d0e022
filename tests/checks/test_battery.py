"""The battery: what every method must hold, on a decoder, an encoder and an encoder-decoder."""

from __future__ import annotations

import copy
import functools
import itertools
import tempfile

import models
import pytest
import torch
from checks.rows import FAMILIES, ROWS, meeting
from checks.state import assert_same, gradients, logits, snapshot, train

import tightfit
from tightfit.core.recipe import as_recipe

# a random model puts much probability on dropped tokens, and the method says so
pytestmark = [
    pytest.mark.filterwarnings(r"ignore:PartialEmbedding\(head='pruned'\):UserWarning"),
    # and that a plain model is not the one that was trained
    pytest.mark.filterwarnings(r"ignore:(merge|export)\(\). the weights were trained with a second:UserWarning"),
]

# what eval(repr(recipe)) may use
NAMES = {"chain": tightfit.chain, **{cls.__name__: cls for cls in tightfit.core.recipe.method_classes().values()}}

each = pytest.mark.parametrize(
    ("row", "family"), [pytest.param(row, f, id=f"{row.name}-{f}") for row in ROWS for f in row.families]
)
# the dearer checks see one family a row, in turn
in_turn = [(row, f if f in row.families else row.families[0]) for row, f in zip(ROWS, itertools.cycle(FAMILIES))]
each_in_turn = pytest.mark.parametrize(
    ("row", "family"), [pytest.param(row, f, id=f"{row.name}-{f}") for row, f in in_turn]
)


def _variant(row) -> bool:
    """Whether another row stands for the same method with its defaults."""
    return any(row.name.startswith(f"{other.name}-") for other in ROWS)


each_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
each_row_variants_slow = pytest.mark.parametrize(
    "row", [pytest.param(row, marks=pytest.mark.slow if _variant(row) else (), id=row.name) for row in ROWS]
)


def applied_to(row, family, **options):
    model = models.build(family, **options)
    return model, tightfit.apply(model, row.make(model))


@each
def test_names_stay_and_remove_restores_everything(row, family):
    model = models.build(family)
    model(**models.batch(model))  # some models complete their config in the first forward
    before = snapshot(model)
    applied = tightfit.apply(model, row.make(model))
    if row.keeps_names:
        assert list(before["flags"]) == [n for n, _ in model.named_parameters()]
        assert {k: v.shape for k, v in before["values"].items()} == {k: v.shape for k, v in model.state_dict().items()}
    gradients(model, models.batch(model))
    assert applied.remove() is model
    model.zero_grad()
    assert_same(before, snapshot(model))
    with pytest.raises(tightfit.StateError, match=r"taken off already"):
        applied.remove()


@each_row
def test_a_recipe_round_trips_as_json_yaml_and_code(row):
    recipe = as_recipe(row.make(models.build("bert")))
    assert tightfit.Recipe.from_json(recipe.to_json()) == recipe
    assert tightfit.Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert eval(repr(recipe), dict(NAMES)) == recipe
    assert hash(tightfit.Recipe.from_json(recipe.to_json())) == hash(recipe)


@each
def test_save_and_load_give_equal_logits(row, family, tmp_path):
    model, applied = applied_to(row, family)
    batch = models.batch(model)
    train(model, applied.optimizer(lr=1e-2), batch, 2)
    applied.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["recipe.json", "tightfit.safetensors"]
    base = models.build(family)
    again = tightfit.load(base, tmp_path)
    assert again.recipe == applied.recipe
    assert torch.equal(logits(base, batch), logits(model, batch))


@each
def test_export_and_merge_are_stock_and_equal(row, family, tmp_path):
    model, applied = applied_to(row, family)
    stock = type(models.build(family))
    batch = models.batch(model)
    train(model, applied.optimizer(lr=1e-2), batch, 2)
    live = logits(model, batch)
    if not row.exports:
        for leave in (lambda: applied.export(tmp_path / "stock"), applied.merge):
            with pytest.raises(tightfit.StateError, match="has no place in a stock"):
                leave()
        assert not (tmp_path / "stock").exists()
        assert torch.equal(logits(model, batch), live)
        return
    config = snapshot(model)["config"]
    applied.export(tmp_path / "stock")
    assert snapshot(model)["config"] == config
    assert torch.equal(logits(model, batch), live)
    exported, info = stock.from_pretrained(tmp_path / "stock", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert exported.config.architectures == [stock.__name__]
    merged = applied.merge()
    assert type(merged) is stock
    assert torch.equal(logits(exported, batch), logits(merged, batch))
    if row.merges_equal:
        torch.testing.assert_close(logits(merged, batch), live, rtol=1e-4, atol=1e-5)


@each
def test_a_deepcopy_is_independent(row, family):
    model, _applied = applied_to(row, family)
    batch = models.batch(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, batch), logits(model, batch))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    assert not own & {p.untyped_storage()._cdata for p in twin.parameters()}
    train(twin, torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=0.5), batch, 2)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not torch.equal(logits(twin, batch), logits(model, batch))


def _assert_gradients(row, family, model, found, stock_found, **tolerance):
    (loss, grads), (stock_loss, stock_grads) = found, stock_found
    assert torch.isfinite(loss)
    assert grads
    assert all(torch.isfinite(g).all() for g in grads.values())
    if not row.is_exact(family):
        return
    torch.testing.assert_close(loss, stock_loss, **tolerance)
    assert set(grads) == set(stock_grads)
    ids = list(models.kept_ids(model))
    for name, gradient in grads.items():
        wanted = stock_grads[name]
        if gradient.shape != wanted.shape:  # a table of fewer rows: the others must have had none
            rest = wanted.clone()
            rest[ids] = 0
            assert not rest.any(), name
            wanted = wanted[ids]
        torch.testing.assert_close(gradient, wanted, msg=lambda m, name=name: f"{name}: {m}", **tolerance)


@each
def test_gradients_over_two_batches(row, family):
    stock = models.build(family)
    model, _applied = applied_to(row, family)
    batches = [models.batch(stock, seed=1), models.batch(stock, seed=2, length=7)]
    found, wanted = gradients(model, *batches), gradients(stock, *batches)
    _assert_gradients(row, family, model, found, wanted, rtol=1e-4, atol=1e-6)


@each_in_turn
def test_gradients_under_autocast(row, family):
    stock = models.build(family, dropout=0.0)
    model, _applied = applied_to(row, family, dropout=0.0)
    batch = models.batch(stock)
    found, wanted = gradients(model, batch, autocast=True), gradients(stock, batch, autocast=True)
    _assert_gradients(row, family, model, found, wanted, rtol=0.1, atol=2e-2)  # bfloat16 keeps 8 bits


@each_in_turn
def test_the_models_own_checkpointing_on_top(row, family):
    if "checkpointing" in row.name:
        pytest.skip("it is the model's own checkpointing")
    model, _applied = applied_to(row, family)
    twin = copy.deepcopy(model)  # the same step again where a method counts its steps
    batch = models.batch(model)
    loss, plain = gradients(model, batch)
    twin.activation_checkpointing_enable({"use_reentrant": False})
    again_loss, again = gradients(twin, batch)
    assert set(plain) == set(again)
    torch.testing.assert_close(again_loss, loss)
    if not row.recomputes_equal:
        off = sum((again[name] - grad).square().sum() for name, grad in plain.items())
        assert off.sqrt() < 0.05 * sum(grad.square().sum() for grad in plain.values()).sqrt()
        return
    for name in plain:
        torch.testing.assert_close(again[name], plain[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@each_in_turn
def test_inference_mode(row, family):
    model, _applied = applied_to(row, family)
    batch = models.batch(model)
    wanted = logits(model, batch)
    model(**batch).loss.backward()
    with torch.inference_mode():
        model(**batch)
        state, found = model.state_dict(), model.eval()(**batch).logits
    torch.testing.assert_close(found, wanted)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model.train()(**batch).loss.backward()  # nothing that was made in it is left behind


# torch's checkpoint runs again with what is in the model at the time; rows in host memory are no parameters
OTHER_RUNS = ("checkpointing", "tape", "sparse")
OWN_RUNS = [pytest.param(r, f, id=f"{r.name}-{f}") for r, f in in_turn if not r.name.startswith(OTHER_RUNS)]


@pytest.mark.parametrize(("row", "family"), OWN_RUNS)
def test_a_step_with_other_parameters_and_a_backward_in_another_mode(row, family):
    model, _applied = applied_to(row, family)
    batch, twin = models.batch(model), copy.deepcopy(model)
    loss, grads = gradients(model, batch)
    own = {name: p.detach().clone().requires_grad_() for name, p in twin.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name in own:
            twin.get_parameter(name).add_(1.0)
    torch.manual_seed(0)
    again = torch.func.functional_call(twin, own, (), batch).loss
    torch.testing.assert_close(again.detach(), loss)
    twin.eval()
    found = torch.autograd.grad(again, [own[name] for name in grads])
    torch.testing.assert_close(dict(zip(grads, found)), grads)
    assert not any(module.training for module in twin.modules())
    assert not any(parameter is own.get(name) for name, parameter in twin.named_parameters())


@pytest.mark.slow
@each_in_turn
def test_compiled_a_step_is_the_same_or_stock(row, family):
    torch._dynamo.reset()
    model, _applied = applied_to(row, family, dropout=0.0)  # compiled, torch's checkpoint drops others
    batches, twin = [models.batch(model, seed=1), models.batch(model, seed=2, length=7)], copy.deepcopy(model)
    own = gradients(twin, *batches)
    compiled = torch.compile(model, backend="eager")
    loss, found = gradients(compiled, *batches)
    found = {name.removeprefix("_orig_mod."): gradient for name, gradient in found.items()}
    stock_model = models.build(family, dropout=0.0)
    stock = gradients(stock_model, *batches)
    try:
        torch.testing.assert_close((loss, found), own, rtol=1e-4, atol=1e-6)
    except AssertionError:  # inside the compiler operators are stock
        if not any(tightfit.Slot.OPERATORS in t.touches for t in as_recipe(row.make(stock_model))):
            raise
        torch.testing.assert_close((loss, found), stock, rtol=1e-4, atol=1e-6)


@each_in_turn
def test_training_lowers_the_loss(row, family):
    model, applied = applied_to(row, family, dropout=0.0)
    losses = train(model, applied.optimizer(lr=1e-2), models.batch(model), 8)
    assert sum(losses[-2:]) < sum(losses[:2])


@each_in_turn
def test_planning_is_pure(row, family):
    model = models.build(family)
    before, random = snapshot(model), torch.get_rng_state()
    plan = tightfit.plan(model, row.make(model), batch=models.batch(model), optimizer="sgd")
    assert_same(before, snapshot(model))
    assert torch.equal(torch.get_rng_state(), random)
    assert plan.peak_bytes > 0
    assert not plan.conflicts
    assert plan.edits
    applied = tightfit.apply(model, row.make(model))
    assert plan.trainable_parameters == sum(p.numel() for p in applied.parameters())


@pytest.mark.parametrize("row", ROWS[::3], ids=lambda row: row.name)
def test_planning_needs_no_weights(row):
    family = "llama" if "llama" in row.families else row.families[0]
    real = models.build(family)
    tasks = {"llama": "causal-lm", "bert": "sequence-classification", "vit": "image-classification"}
    model = tightfit.skeleton(real.config, task=tasks[family])
    plan = tightfit.plan(model, row.make(real), batch=(2, 8), optimizer="sgd")
    assert all(p.is_meta for p in model.parameters())
    assert plan.trainable_parameters == sum(p.numel() for p in tightfit.apply(real, row.make(real)).parameters())


PAIRS = [
    pytest.param(a, b, marks=pytest.mark.slow if _variant(a) or _variant(b) else (), id=f"{a.name}-{b.name}")
    for a, b in itertools.combinations(ROWS, 2)
    if meeting(a, b)
]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_every_pair_composes_or_is_refused(first, second):
    model = models.build(meeting(first, second))
    model(**models.batch(model))  # some models complete their config in the first forward
    before = snapshot(model)
    recipe = tightfit.chain(first.make(model), second.make(model))
    try:
        applied = tightfit.apply(model, recipe)
    except tightfit.ConflictError as error:
        assert_same(before, snapshot(model))
        assert type(first.make(model)).__name__ in str(error)
        assert type(second.make(model)).__name__ in str(error)
        assert tightfit.plan(model, recipe, batch=(2, 8)).conflicts
        return
    except tightfit.SelectorError as error:  # the other one freezes all that this one acts on
        assert_same(before, snapshot(model))
        assert "trains under this recipe" in str(error)
        return
    except tightfit.UnsupportedModelError as error:  # the other one is not for images
        assert_same(before, snapshot(model))
        assert "vit" in (*first.families, *second.families), error
        return
    losses = train(model, applied.optimizer(torch.optim.SGD, lr=0.0), models.batch(model), 1)
    assert losses[0] > 0
    applied.remove()
    model.zero_grad()
    assert_same(before, snapshot(model))


def _trainer_run(model, callbacks, folder):
    from transformers import Trainer, TrainingArguments

    rows = [{k: v[0] for k, v in models.batch(model, size=1, seed=seed).items()} for seed in range(6)]
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        weight_decay=0.0,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=callbacks)
    trainer.train()
    return trainer


@functools.cache
def _stock_result():
    with tempfile.TemporaryDirectory() as folder:
        model = models.build("bert")
        _trainer_run(model, [], folder)
        return model.state_dict()


@each_row_variants_slow
def test_a_plain_trainer_run(row, tmp_path):
    family = "bert" if "bert" in row.families else row.families[0]
    model, applied = applied_to(row, family)
    stock = models.build(family)
    before = logits(model, models.batch(model))
    trainer = _trainer_run(model, [applied.callback()], tmp_path)
    assert trainer.label_names == ["labels"]
    assert not torch.equal(logits(model, models.batch(model)), before)
    merged = applied.merge() if row.exports else applied.remove()
    assert type(merged) is type(stock)
    if row.is_exact(family):
        for name, value in _stock_result().items():
            torch.testing.assert_close(merged.state_dict()[name], value, rtol=1e-3, atol=2e-4)
