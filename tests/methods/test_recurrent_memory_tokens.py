"""RecurrentMemory beside TokenTune: tokens are selected inside each segment, and the memory's slots always are."""

from __future__ import annotations

import pytest
import torch
from recurrent_memory_cases import (
    CLASSIFIERS,
    DECODERS,
    TAGGERS,
    applied,
    assert_close,
    batch,
    build,
    gradients,
    memory_of,
)

import tightfit
from tightfit import RecurrentMemory, TokenTune, chain

ALL = TokenTune(count=100)
"""More tokens than a segment has, through the selection's own two runs."""


def both(make, *others, **fields):
    """A model with both; its memory as in `applied`."""
    model = build(make)
    tightfit.apply(model, chain(RecurrentMemory(tokens=2, segment=5, **fields), *others))
    with torch.no_grad():
        memory_of(model).copy_(torch.linspace(-1, 1, memory_of(model).numel()).view_as(memory_of(model)))
    return model


def classes(given, count=3):
    return {**given, "labels": torch.arange(len(given["labels"])) % count}


@pytest.mark.parametrize("schedule", ["model", "block"])
@pytest.mark.parametrize("family", ["gpt2", "gemma3", pytest.param("opt", marks=pytest.mark.slow)])
def test_all_tokens_of_a_decoder_are_the_whole_step(family, schedule):
    given = batch(left=schedule == "block")
    wanted = gradients(both(DECODERS[family]), given)
    found = gradients(both(DECODERS[family], TokenTune(count=100, schedule=schedule)), given)
    assert_close(found, wanted, 1e-12 if family != "gemma3" else 1e-6)


@pytest.mark.parametrize("make", [CLASSIFIERS["bert"], CLASSIFIERS["llama"]], ids=["bert", "llama"])
def test_all_tokens_of_a_classifier_are_the_whole_step(make):
    given = classes(batch((19, 12, 7, 4)))
    assert_close(gradients(both(make, ALL), given), gradients(both(make), given), 1e-6)


def test_all_tokens_of_a_tagger_are_the_whole_step():
    given = batch((19, 12, 7, 4), tags=3)
    wanted = gradients(both(TAGGERS["bert"]), given)
    assert_close(gradients(both(TAGGERS["bert"], ALL), given), wanted, 1e-12)


@pytest.mark.parametrize("policy", ["random", "bernoulli", "score"])
def test_the_second_run_selects_the_same_tokens(policy):
    results = []
    for replay in (True, False):
        model = both(DECODERS["gpt2"], TokenTune(ratio=0.5, policy=policy), replay=replay)
        results.append(gradients(model, batch(), batch(seed=4)))
    assert_close(results[0], results[1])


def test_gradients_flow_through_selected_tokens_and_the_memory_only():
    model = both(DECODERS["gpt2"], TokenTune(count=2, policy="suffix"))
    given = batch((15, 15))
    _, grads = gradients(model, given)
    assert memory_of(model).grad.abs().sum() > 0
    # the last two tokens of each segment, and the memory: no other token's embedding has a gradient (the table is tied,
    # so take the positions': those of the text stand behind two of the memory)
    table = next(g for n, g in grads.items() if n.endswith("wpe.weight"))
    moved = table.abs().sum(1).nonzero().flatten().tolist()
    assert moved == [0, 1, 5, 6, 7, 8]


def test_the_budget_is_one_of_text():
    model = both(DECODERS["gpt2"], TokenTune(ratio=0.4))
    with pytest.raises(ValueError, match=r"token_positions or token_scores were given"):
        model(**batch((15, 15)), token_positions=torch.zeros(2, 1, dtype=torch.long))
    out = tightfit.apply(build(DECODERS["gpt2"]), chain(RecurrentMemory(tokens=2, segment=10), TokenTune(ratio=0.4)))
    out.model(**batch((20, 20)))
    assert out.report()["methods"]["TokenTune"]["selected"] == 4 + 4


def test_a_schedule_with_a_cache_is_refused():
    recipe = chain(RecurrentMemory(tokens=2, segment=5), TokenTune(ratio=0.5, policy="suffix", schedule="suffix"))
    with pytest.raises(tightfit.ConflictError, match=r"both take over \(cache\)"):
        tightfit.apply(build(DECODERS["gpt2"]), recipe)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["model", "block"])
def test_plans_are_real_to_the_byte(schedule):
    model = build(DECODERS["llama"], double=False)
    recipe = chain(RecurrentMemory(tokens=2, segment=10), TokenTune(ratio=0.4, schedule=schedule))
    plan = tightfit.plan(model, recipe, batch=(3, 30))
    found = plan.verify(model)
    assert found.saved_bytes == plan.simulation.saved_bytes
    assert abs(plan.peak_bytes - found.peak_bytes) <= 256


def test_evaluation_selects_nothing():
    model, plain = both(DECODERS["gpt2"], TokenTune(ratio=0.4)), both(DECODERS["gpt2"])
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch()).logits, plain.eval()(**batch()).logits)


def test_applied_alone_nothing_has_changed():
    model = build(DECODERS["gpt2"])
    out = applied(model, tokens=2, segment=5)
    wanted = gradients(model, batch())
    out.remove()
    applied(model, tokens=2, segment=5)
    assert_close(gradients(model, batch()), wanted, 0.0)
