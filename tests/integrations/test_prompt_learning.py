"""PEFT's prompt learning: trained tokens, or keys and values, before each row's own."""

from __future__ import annotations

import models
import peft
import pytest
import torch

import tightfit

PROMPTS = "prompt_encoder.default.embedding.weight"
SHORT = {"tokens": 2, "segment": 8}


def prompted(model, kind=peft.PromptTuningConfig):
    torch.manual_seed(1)
    return peft.get_peft_model(model, kind(task_type="CAUSAL_LM", num_virtual_tokens=3))


@pytest.mark.parametrize("kind", [peft.PromptTuningConfig, peft.PrefixTuningConfig])
@pytest.mark.parametrize("method", [tightfit.FusedOps(), tightfit.Mesa(), tightfit.SparseAdapter(width=64, top_k=8)])
def test_prompts_train_on_as_without_the_recipe(method, kind):
    gradients = []
    for recipe in (tightfit.chain(), method):
        model = prompted(models.build("llama", dropout=0.0), kind)
        tightfit.apply(model, recipe)
        model(**models.batch(model)).loss.backward()
        gradients.append(model.get_parameter(PROMPTS).grad)
    assert gradients[0].abs().max() > 0
    tolerance = 1e-6 if not isinstance(method, tightfit.Mesa) else float(gradients[0].abs().max()) / 10
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0.0, atol=tolerance)


@pytest.mark.parametrize(
    ("method", "kind", "error", "reason"),
    [
        (tightfit.LadderSide(), peft.PromptTuningConfig, tightfit.ConflictError, "own PEFT adapters both take over"),
        (tightfit.Losa(), peft.PrefixTuningConfig, tightfit.ConflictError, "own PEFT adapters both take over"),
        (
            tightfit.TokenTune(ratio=0.5),
            peft.PromptTuningConfig,
            tightfit.UnsupportedModelError,
            "apply the recipe first",
        ),
        (
            tightfit.RecurrentMemory(**SHORT),
            peft.PromptTuningConfig,
            tightfit.UnsupportedModelError,
            "apply the recipe first",
        ),
        (
            tightfit.Checkpointing(),
            peft.PrefixTuningConfig,
            tightfit.UnsupportedModelError,
            "so the prefix would not train",
        ),
    ],
)
def test_prompts_that_would_not_train_are_refused(method, kind, error, reason):
    with pytest.raises(error, match=reason):
        tightfit.apply(prompted(models.build("llama"), kind), method)


@pytest.mark.parametrize("method", [tightfit.TokenTune(ratio=0.5), tightfit.RecurrentMemory(**SHORT)])
def test_prompts_put_on_after_the_recipe_train(method):
    model = models.build("llama")
    tightfit.apply(model, method)
    model = prompted(model)
    model(**models.batch(model)).loss.backward()
    assert model.get_parameter(PROMPTS).grad.abs().max() > 0
