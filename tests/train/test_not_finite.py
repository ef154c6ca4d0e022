"""Losses and gradients that are not finite: the step, the layer, what is kept, and leaving batches out."""

import math

import pytest
import torch
from runs import recipe_file
from safetensors.torch import load_file

from tightfit.core.errors import TrainingError
from tightfit.train import checkpoints, run, trainer
from tightfit.train.folder import read_metrics
from tightfit.train.non_finite import Part, find_source
from tightfit.train.run import train

pytestmark = pytest.mark.usefixtures("the_weights")

LAYER = "bert.encoder.layer.0.intermediate.dense"


@pytest.fixture
def poison(monkeypatch):
    """Spoil a layer's output, or the gradient of it, in the given steps."""

    def spoil(steps, factor=math.nan, backward=False, layer=LAYER):
        now = {}
        real_step, real_build = trainer.RunTrainer.training_step, run.build_model

        def step(self, *args, **kwargs):
            now["step"] = self.state.global_step + 1
            return real_step(self, *args, **kwargs)

        def hook(module, args, output):
            if now.get("step") not in steps or not module.training:
                return None
            if backward:
                output.register_hook(lambda grad: grad * factor)
                return None
            return output * factor

        def build(*args):
            model = real_build(*args)
            model.get_submodule(layer).register_forward_hook(hook)
            return model

        monkeypatch.setattr(trainer.RunTrainer, "training_step", step)
        monkeypatch.setattr(run, "build_model", build)

    return spoil


@pytest.mark.parametrize(
    ("factor", "backward", "words"),
    [
        (math.nan, False, f"step 4: the loss is nan: the output of {LAYER} (Linear) is nan"),
        (math.inf, False, f"step 4: the loss is nan: the output of {LAYER} (Linear) is "),
        (math.nan, True, f"step 4: the gradient norm is nan: the gradient of the output of {LAYER} (Linear) is nan"),
    ],
)
@pytest.mark.parametrize("accumulated", [1, 2])
def test_it_stops_with_the_step_and_the_layer(folder, tmp_path, poison, factor, backward, words, accumulated):
    poison([4], factor, backward)
    with pytest.raises(TrainingError) as failure:
        train(recipe_file(folder, [], tmp_path / "run", save_every=1, gradient_accumulation=accumulated))
    said = str(failure.value)
    assert said.startswith(words) and "the weights are as after step 3" in said, said
    assert said.count("checkpoint-3") == 1 and "train.non_finite: skip" in said
    kept = checkpoints.checkpoints(tmp_path / "run" / "checkpoints")
    assert [p.name for p in kept] == ["checkpoint-2", "checkpoint-3"]
    assert all(t.isfinite().all() for t in load_file(kept[-1] / "tightfit.safetensors").values())


RECIPES = [[], [{"Lora": {"rank": 2}}], [{"SparseAdapter": {"width": 64, "top_k": 4}}], [{"FusedOps": {}}]]


@pytest.mark.parametrize("methods", RECIPES, ids=lambda m: next(iter(m[0])) if m else "stock")
@pytest.mark.parametrize("backward", [False, True])
def test_skip_leaves_the_batch_out(folder, tmp_path, poison, methods, backward):
    layer = "bert.embeddings.LayerNorm" if backward is False else "classifier"
    poison([3], backward=backward, layer=layer)
    heard = []
    file = recipe_file(folder, methods, tmp_path / "run", save_every=1, max_steps=3, non_finite="skip")
    result = train(file, echo=heard.append)
    assert result.steps == 3 and math.isfinite(result.metrics["loss"])
    saved = tmp_path / "run" / "checkpoints"
    for name in ("tightfit.safetensors", "optimizer.safetensors"):  # nothing moved, no moment and no count of steps
        before, after = (load_file(saved / f"checkpoint-{step}" / name) for step in (2, 3))
        assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    rows = [r for r in read_metrics(tmp_path / "run") if "skipped" in r]
    assert [r["step"] for r in rows] == [3] and ("SparseAdapter" in rows[0]["skipped"] or layer in rows[0]["skipped"])
    assert any(line.startswith("step 3: left out, the ") for line in heard)
    losses = [r["loss"] for r in read_metrics(tmp_path / "run") if "loss" in r]
    assert len(losses) == 3 and all(math.isfinite(loss) for loss in losses)


def test_a_skipping_run_trains_on(folder, tmp_path, poison):
    poison([2, 4])
    file = recipe_file(folder, [], tmp_path / "run", save_every=1, max_steps=5, non_finite="skip", max_skipped=1)
    train(file)
    states = [load_file(tmp_path / "run" / "checkpoints" / f"checkpoint-{s}" / "tightfit.safetensors") for s in (4, 5)]
    assert any(not torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_too_many_in_a_row_stop_it_and_the_count_outlives_a_resume(folder, tmp_path, poison, monkeypatch):
    poison([4, 5, 6, 7])
    file = recipe_file(folder, [], tmp_path / "run", save_every=1, non_finite="skip", max_skipped=2)
    with pytest.raises(TrainingError, match=r"step 6: .*3 batches in a row, train.max_skipped allows 2"):
        train(file)
    assert checkpoints.checkpoints(tmp_path / "run" / "checkpoints")[-1].name == "checkpoint-5"
    with pytest.raises(TrainingError, match=r"step 6: .*3 batches in a row"):
        train(file, resume=True)


def test_weights_that_are_not_finite_are_never_saved(folder, tmp_path, monkeypatch):
    real = trainer.RunCallback.on_step_end

    def spoil(self, args, state, control, model=None, **kwargs):
        if state.global_step == 3:
            with torch.no_grad():
                model.classifier.bias.fill_(math.inf)
        return real(self, args, state, control, **kwargs)

    monkeypatch.setattr(trainer.RunCallback, "on_step_end", spoil)
    with pytest.raises(TrainingError, match=r"step 3: classifier.bias is not finite after it, .*checkpoint-2"):
        train(recipe_file(folder, [], tmp_path / "run", save_every=1))
    kept = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["checkpoint-1", "checkpoint-2"]


def test_the_random_state_and_the_model_are_as_before_the_search():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 4))
    cpu, state = torch.device("cpu"), torch.get_rng_state()
    part = Part.of({"x": torch.ones(2, 4)}, None, cpu)

    def loss_of(scale):
        def loss(part):
            return (model(part.inputs["x"]) * scale).sum()

        return loss

    found = find_source(model, [part], loss_of(1.0), cpu)
    assert found == "no layer: run again, the step is finite"
    assert find_source(model, [part], loss_of(math.inf), cpu).startswith("the loss itself")
    assert torch.equal(torch.get_rng_state(), state) and all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    with torch.no_grad():
        model[2].weight[0, 0] = math.nan
    assert find_source(model, [part], loss_of(1.0), cpu) == "the weight 2.weight is not finite"


def test_minus_infinity_is_how_things_are_left_out():
    class Masks(torch.nn.Module):
        def forward(self, x):
            return x.masked_fill(x > 0.5, -math.inf)

    class Softmax(torch.nn.Module):
        def forward(self, x):
            return x.softmax(-1) * x.exp().sum(-1, keepdim=True).log()

    model = torch.nn.Sequential(Masks(), Softmax())
    part = Part.of({}, None, torch.device("cpu"))
    found = find_source(model, [part], lambda part: model(torch.ones(1, 3)).sum(), torch.device("cpu"))
    assert found == "the output of 1 (Softmax) is nan, after minus infinity in the output of 0"
