"""A plan beside one real step, and measuring where nothing can be simulated."""

import copy
import gc

import models
import pytest
import torch
from torch import nn

import tightfit
from tightfit.core.memory import live_bytes, live_tensors, measure
from tightfit.core.verify import PHASES, run_step

BOTH = tightfit.chain(tightfit.Lora(rank=2), tightfit.Checkpointing())


@pytest.mark.parametrize(
    ("make", "recipe", "options"),
    [
        (models.bert, None, {"clip": 1.0, "accumulate": 2}),
        (models.gpt2, BOTH, {"optimizer": "sgd-momentum"}),
        (models.bert, tightfit.Checkpointing(), {"autocast": torch.bfloat16}),
    ],
)
def test_every_phase_is_as_predicted(make, recipe, options):
    model = make()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    found = tightfit.plan(model, recipe, batch=(4, 32), **options).verify()
    assert torch.equal(torch.get_rng_state(), state)
    assert abs(found.peak_error) < 1e-3
    rows = {name: (predicted, measured) for name, predicted, measured in found.rows()}
    assert set(rows) >= {"peak", "forward", "backward", "optimizer", "zero grad", "saved for backward"}
    assert ("clip" in rows) == ("clip" in options)
    for name, (predicted, measured) in rows.items():
        assert abs(predicted / measured - 1) < 1e-3, name
    assert list(found.levels) == [name for name in PHASES if name in found.levels]
    assert found.measured.phases == {name: max(values) for name, values in found.levels.items()}
    assert found.peak_bytes == max(found.measured.phases.values())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    text = str(found)
    assert "predicted" in text and "measured" in text and "zero grad" in text
    assert found.to_dict()["phases"] == found.measured.phases


@pytest.mark.parametrize("make", [models.bert, models.gpt2, models.t5])
def test_the_example_holds_ids_that_the_recipe_can_read(make):
    model = make()
    recipe = tightfit.PartialEmbedding(ids=[i for i in models.kept_ids(model) if i < 4 or i % 3])
    assert abs(tightfit.plan(model, recipe, batch=(2, 16)).verify().peak_error) < 5e-3


def test_it_agrees_with_measure():
    model, batch = models.bert(), models.batch(models.bert(), size=4, length=16)
    step = run_step(model, tightfit.chain(), batch)
    gc.collect()
    others = live_bytes() - sum(p.nbytes for p in model.parameters()) - sum(b.nbytes for b in model.buffers())
    others -= sum(t.nbytes for t in batch.values())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False)

    def whole():
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    found = measure(whole, repeats=0)
    assert abs(step.peak_bytes / (found.peak_bytes - others) - 1) < 1e-3
    assert step.saved_bytes == found.saved_bytes
    assert step.by_category["optimizer"] == found.by_category["optimizer"]


def test_gradients_are_counted_of_a_step_that_drops_them():
    layer, x = nn.Linear(64, 64), torch.randn(4, 64)
    optimizer = torch.optim.AdamW(layer.parameters(), foreach=False)

    def whole():
        layer(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    gc.collect()
    others = sum(t.grad.nbytes for t in live_tensors() if isinstance(t, nn.Parameter) and t.grad is not None)
    found = measure(whole, repeats=0)
    own = sum(p.nbytes for p in layer.parameters())
    assert own <= found.by_category["gradients"] <= others + own  # what else is alive in the process may hide some
    assert sum(found.by_category.values()) == found.peak_bytes


def test_in_place_trains_the_model_and_takes_the_recipe_off():
    model = models.bert()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = tightfit.plan(model, tightfit.Checkpointing(), batch=(4, 16)).verify(in_place=True)
    assert abs(found.peak_error) < 1e-3
    assert any(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    tightfit.apply(model, tightfit.Checkpointing()).remove()  # nothing was left on it


def test_a_step_in_place_that_fails_takes_the_recipe_off():
    def failing(parameters):
        raise RuntimeError("no optimizer")

    model = models.bert()
    with pytest.raises(RuntimeError, match="no optimizer"):
        run_step(model, tightfit.chain(tightfit.Mesa()), models.batch(model), optimizer=failing, in_place=True)
    tightfit.apply(model, tightfit.Mesa()).remove()


def test_a_skeletons_plan_is_verified_with_the_model():
    model = models.bert()
    plan = tightfit.plan(tightfit.skeleton(model.config, task="sequence-classification"), batch=(4, 16))
    assert abs(plan.verify(model).peak_error) < 1e-3
    with pytest.raises(tightfit.StateError, match="is gone"):
        plan.verify()
    with pytest.raises(tightfit.StateError, match="BertForSequenceClassification, the given model is a GPT2"):
        plan.verify(models.gpt2())


def test_what_cannot_be_verified():
    model = models.bert()
    bare = tightfit.skeleton(model.config, task="sequence-classification")
    with pytest.raises(tightfit.StateError, match="no weights"):
        tightfit.plan(bare, batch=(2, 8)).verify()
    refused = tightfit.plan(model, tightfit.chain(tightfit.Lora(), tightfit.Lora(rank=2)), batch=(2, 8))
    with pytest.raises(tightfit.ConflictError, match="twice"):
        refused.verify()
    if not torch.cuda.is_available():
        with pytest.raises(tightfit.StateError, match="for a GPU"):
            tightfit.plan(model, batch=(2, 8), device="cuda").verify()


def test_a_plan_keeps_no_model_alive():
    plan = tightfit.plan(models.bert(), batch=(2, 8))
    gc.collect()
    assert plan.source.model() is None


# A model that cannot be simulated


class Reads(nn.Module):
    """Looks at a value of its input, which a simulated step has not."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(64, 64)
        self.relu = Branch()

    def forward(self, x):
        loss = self.relu(self.inner(x)).square().mean()
        return type("Output", (), {"loss": loss})()


class Branch(nn.Module):
    def forward(self, x):
        return x if x.mean().item() > 0 else x.relu()


def test_the_operator_is_named_and_a_step_is_measured_if_asked_to():
    model, batch = Reads(), {"x": torch.randn(16, 64)}
    with pytest.raises(tightfit.SimulationError, match=r"_local_scalar_dense.* in module relu"):
        tightfit.plan(model, batch=batch)
    found = tightfit.plan(model, batch=batch, fallback="measure")
    assert found.measured and found.simulation is None
    weights = 64 * 65 * 4
    assert found.by_category["weights"] == weights and found.by_category["gradients"] == weights
    assert found.peak_bytes > 4 * weights  # with gradients and two moments
    assert "measured peak" in str(found) and "_local_scalar_dense" in str(found)
    with pytest.raises(tightfit.StateError, match="no simulated step"):
        found.verify(model)


def test_a_batch_without_labels_is_named_when_measured_too():
    model = models.bert()
    batch = {key: value for key, value in models.batch(model).items() if key != "labels"}
    with pytest.raises(tightfit.SimulationError, match="hold no loss; put labels into the batch"):
        tightfit.plan(model, batch=batch, fallback="measure")


def test_measuring_needs_weights_and_a_known_word():
    with torch.device("meta"):
        model = Reads()
    with pytest.raises(tightfit.SimulationError, match=r"_local_scalar_dense.* no weights"):
        tightfit.plan(model, batch={"x": torch.randn(2, 64)}, fallback="measure")
    with pytest.raises(ValueError, match="fallback"):
        tightfit.plan(model, batch={"x": torch.randn(2, 64)}, fallback="guess")
