"""The unbiased mode, by enumerating every subset of tokens that could be drawn; and its operators."""

from __future__ import annotations

import itertools

import pytest
import token_tune_cases as cases
import torch
from token_tune_cases import batch, build, gap, gradients

import tightfit
from tightfit import FusedOps, TokenTune, chain
from tightfit.ops.overwrite import overwrite, reference
from tightfit.ops.own_key import own_key, own_probability
from tightfit.ops.own_key.reference import scaled_attention

LENGTH = 5


@pytest.fixture(autouse=True)
def in_float64():
    with cases.doubles():
        yield


def mean_gradient(model, inputs, chance, **given):
    """The mean over all subsets of the gradients, by their probability."""
    total = None
    for subset in itertools.product((False, True), repeat=LENGTH):
        weight = 1.0
        for chosen, p in zip(subset, chance):
            weight *= p if chosen else 1 - p
        places = [place for place, chosen in enumerate(subset) if chosen]
        if not places:
            continue  # no token, no gradient
        loss = model(**inputs, token_positions=torch.tensor([places]), **given).loss
        found = gradients(model, loss)
        total = {n: weight * g + (0 if total is None else total[n]) for n, g in found.items()}
    return total


CASES = [
    pytest.param("llama", False),
    pytest.param("llama", True, marks=pytest.mark.slow),
    *[pytest.param(n, e, marks=pytest.mark.slow) for n in ("gpt2", "mistral") for e in (True, False)],
]


@pytest.mark.parametrize(("name", "equal"), CASES)
def test_the_mean_over_all_subsets_is_the_full_gradient(name, equal):
    model = build(name)
    inputs = batch(model, None, rows=1, length=LENGTH)
    inputs["labels"][:, 2] = 7  # the helper leaves one out
    full = gradients(model, model(**inputs).loss)
    scores = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0] if equal else [1.2, 0.7, 1.5, 0.9, 0.7]], dtype=torch.float64)
    chance = (0.5 * LENGTH * scores / scores.sum()).tolist()[0]
    given = {} if equal else {"token_scores": scores}
    with tightfit.apply(model, TokenTune(ratio=0.5, policy="bernoulli", unbiased=True)):
        assert gap(mean_gradient(model, inputs, chance, **given), full) < 1e-12
    with tightfit.apply(model, TokenTune(ratio=0.5, policy="bernoulli", normalise="all")):
        biased = mean_gradient(model, inputs, chance, **given)
    assert gap(biased, full) > 0.05


def test_with_fused_operators_too():
    model = build("llama")
    inputs = batch(model)
    fields = {"ratio": 0.5, "policy": "bernoulli", "unbiased": True}
    found = []
    for recipe in (TokenTune(**fields), chain(TokenTune(**fields), FusedOps()), TokenTune(schedule="block", **fields)):
        with tightfit.apply(model, recipe):
            found.append(gradients(model, model(**inputs).loss))
    assert gap(found[1], found[0]) < 1e-7
    assert gap(found[2], found[0]) < 1e-12


def test_a_scale_between():
    model = build("llama")
    inputs = batch(model)
    pos = cases.positions(model, inputs)
    found = []
    for scale in (1.0, 1.5, 2.0):
        with tightfit.apply(model, TokenTune(ratio=0.5, kv_grad_scale=scale)):
            found.append(gradients(model, model(**inputs, token_positions=pos).loss))
    assert gap(found[1], found[0]) > 1e-3
    # the last block's keys and values: their gradient is a line in the scale
    name = "model.layers.2.self_attn.k_proj.weight"
    torch.testing.assert_close(found[1][name], (found[0][name] + found[2][name]) / 2, rtol=0, atol=1e-14)


# -- operators --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 7, 3), (2, 2, 7, 3)])
@pytest.mark.parametrize("with_factor", [False, True])
def test_overwriting_rows(shape, with_factor):
    generator = torch.Generator().manual_seed(0)
    stored = torch.randn(shape, generator=generator, dtype=torch.float64)
    fresh = torch.randn((*shape[:-2], 4, 3), generator=generator, dtype=torch.float64, requires_grad=True)
    positions = torch.tensor([[0, 3, 5, 6], [1, 4, 1, 1]])
    valid = torch.tensor([[True] * 4, [True, True, False, False]])
    factor = torch.tensor([[1.0, 2.0, 3.0, 4.0]] * 2, dtype=torch.float64) if with_factor else None
    weights = torch.randn(shape, generator=generator, dtype=torch.float64)
    expected = reference.overwrite(stored, fresh, positions, valid, factor)
    wanted = torch.autograd.grad((expected * weights).sum(), fresh)[0]
    found = overwrite(stored, fresh, positions, valid, factor)
    assert torch.equal(found, expected)
    assert found.data_ptr() == stored.data_ptr()
    assert torch.equal(torch.autograd.grad((found * weights).sum(), fresh)[0], wanted)


def test_no_rows_at_all():
    fresh = torch.zeros(1, 0, 2, requires_grad=True)
    stored = torch.ones(1, 3, 2)
    out = overwrite(stored, fresh, torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, 0, dtype=torch.bool))
    assert out.requires_grad
    assert torch.equal(out, torch.ones(1, 3, 2))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_own_keys(groups, masked):
    generator = torch.Generator().manual_seed(0)

    def drawn(heads):
        return torch.randn(2, heads, 5, 3, generator=generator, dtype=torch.float64).requires_grad_()

    query, key, value = drawn(4), drawn(4 // groups), drawn(4 // groups)
    factor = torch.rand(2, 5, generator=generator, dtype=torch.float64) + 1
    mask = torch.zeros(5, 5, dtype=torch.float64).masked_fill(~torch.ones(5, 5).tril().bool(), -torch.inf)
    mask = mask[None, None] if masked else None
    weights = torch.randn(2, 5, 4, 3, generator=generator, dtype=torch.float64)
    positions, valid = torch.arange(5).expand(2, 5), torch.ones(2, 5, dtype=torch.bool)

    def heads(t):
        return t.repeat_interleave(groups, 1)

    expected = scaled_attention(query, heads(key), heads(value), mask, factor, 0.5)
    wanted = torch.autograd.grad((expected * weights).sum(), (query, key, value))
    keys = overwrite(torch.zeros_like(key), key, positions, valid, factor)
    values = overwrite(torch.zeros_like(value), value, positions, valid, factor)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    out = sdpa(query, keys, values, mask, scale=0.5, enable_gqa=True).transpose(1, 2)
    own = own_probability(query.detach(), keys.detach(), mask, positions, 0.5)
    out = own_key(out, query.detach(), key, value, own, factor, 0.5)
    torch.testing.assert_close(out, expected)
    found = torch.autograd.grad((out * weights).sum(), (query, key, value))
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
