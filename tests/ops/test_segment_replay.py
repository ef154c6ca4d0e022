"""Segment replay: the plain loop's values and gradients, with the states kept and nothing else."""

from __future__ import annotations

import copy
import gc
import itertools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tightfit.core.memory import saved_bytes
from tightfit.ops.segment_replay import segment_replay
from tightfit.ops.segment_replay.reference import segment_replay as stored

WIDTH = 6


class Cell(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.mix = nn.Linear(2 * WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, 3)
        self.unused = nn.Parameter(torch.zeros(2))
        self.frozen = nn.Parameter(torch.randn(WIDTH), requires_grad=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, state, given):
        after = torch.tanh(self.mix(torch.cat([state["m"], given["x"]], -1))) * self.frozen
        after = self.dropout(after)
        logits = self.out(after)
        return (logits, logits.argmax(-1)), {"m": after, "step": state["step"] + 1}


def case(steps=5, dropout=0.0, seed=0):
    torch.manual_seed(seed)
    cell = Cell(dropout).double()
    state = {"m": torch.randn(4, WIDTH, dtype=torch.double, requires_grad=True), "step": torch.tensor(0)}
    xs = torch.randn(4, steps, WIDTH, dtype=torch.double, requires_grad=True)
    return cell, state, xs


def step_of(run, cell, state, xs, seed=1, last=0.3):
    torch.manual_seed(seed)
    inputs = [{"x": x, "name": "x"} for x in xs.unbind(1)]
    extra = (list(cell.parameters()),) if run is segment_replay else ()
    outputs, final = run(cell, state, inputs, *extra)
    loss = sum((i + 1) * logits.square().sum() for i, (logits, _) in enumerate(outputs)) + last * final["m"].sum()
    grads = torch.autograd.grad(
        loss, [p for p in cell.parameters() if p.requires_grad] + [state["m"], xs], allow_unused=True
    )
    return outputs, final, grads


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_values_and_gradients_of_the_plain_loop(steps, dropout):
    given = case(steps, dropout)
    outputs, final, grads = step_of(segment_replay, *given)
    wanted_outputs, wanted_final, wanted = step_of(stored, *given)
    for (a, b), (c, d) in zip(outputs, wanted_outputs, strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)
        assert not b.requires_grad
    assert torch.equal(final["m"], wanted_final["m"])
    assert int(final["step"]) == steps
    for a, b in zip(grads, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    _cell, state, xs = case(3)

    def run(m, weight, *parts):
        def step(state, x):
            after = torch.tanh(state @ weight + x)
            return after.sum(-1), after

        outputs, final = segment_replay(step, m, parts, [weight])
        return *outputs, final

    weight = torch.randn(WIDTH, WIDTH, dtype=torch.double, requires_grad=True)
    parts = [x.detach().requires_grad_() for x in xs.unbind(1)]
    assert torch.autograd.gradcheck(run, (state["m"], weight, *parts))


def test_random_numbers_outside_go_on_as_if_nothing_had_run_again():
    cell, state, xs = case(4, 0.5)
    torch.manual_seed(3)
    outputs, _ = segment_replay(cell, state, [{"x": x} for x in xs.unbind(1)], list(cell.parameters()))
    before = torch.get_rng_state()
    sum(logits.sum() for logits, _ in outputs).backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_step_without_gradients_does_not_run_again():
    cell, state, xs = case(5)
    calls = []

    def step(state, given):
        calls.append(given["name"])
        return cell(state, given)

    inputs = [{"x": x, "name": i} for i, x in enumerate(xs.unbind(1))]
    outputs, _ = segment_replay(step, state, inputs, list(cell.parameters()))
    outputs[1][0].sum().backward()
    assert calls == [0, 1, 2, 3, 4, 1, 0]


def test_kept_are_the_states_and_inputs():
    kept = []
    for steps in (2, 4, 8, 16):
        cell, state, xs = case(steps)
        xs = xs.detach()  # its parts are views, whose memory is kept once
        inputs = [{"x": x} for x in xs.unbind(1)]
        own = list(cell.parameters())
        found = []
        kept.append(saved_bytes(lambda: found.append(segment_replay(cell, state, inputs, own))) - xs.nbytes)  # noqa: B023
    state_bytes = 4 * WIDTH * 8 + 8  # and the step number
    assert [b - a for a, b in itertools.pairwise(kept)] == [2 * state_bytes, 4 * state_bytes, 8 * state_bytes]


def test_without_gradients_it_is_the_loop():
    cell, state, xs = case()
    inputs = [{"x": x} for x in xs.unbind(1)]
    with torch.no_grad():
        outputs, _ = segment_replay(cell, state, inputs, list(cell.parameters()))
    assert not outputs[0][0].requires_grad
    outputs, final = segment_replay(cell, state, [], list(cell.parameters()))
    assert outputs == []
    assert final is state


def test_a_state_handed_on_unchanged_and_outputs_that_are_inputs():
    weight = torch.randn(WIDTH, dtype=torch.double, requires_grad=True)

    def step(state, x):
        return (x, x.view(2, -1), x * weight), state

    def run(call, *extra):
        state = torch.ones(WIDTH, dtype=torch.double, requires_grad=True)
        xs = [torch.full((WIDTH,), i + 1.0, dtype=torch.double, requires_grad=True) for i in range(3)]
        outputs, final = call(step, state, xs, *extra)
        loss = sum((a.sum() + b.square().sum()) * c.sum() for a, b, c in outputs) + final.sum()
        return torch.autograd.grad(loss, [weight, state, *xs])

    for a, b in zip(run(segment_replay, [weight]), run(stored), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_accumulation_and_deepcopy():
    cell, state, xs = case()
    twin = copy.deepcopy(cell)
    inputs = [{"x": x} for x in xs.detach().unbind(1)]
    for _ in range(2):
        sum(a.sum() for a, _ in segment_replay(cell, state, inputs, list(cell.parameters()))[0]).backward()
        sum(a.sum() for a, _ in stored(twin, state, inputs)[0]).backward()
    for a, b in zip(cell.parameters(), twin.parameters()):
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cache", [True, False])
def test_autocast(cache):
    cell, state, xs = case(3)
    cell.float()
    state = {**state, "m": state["m"].detach().float().requires_grad_()}
    xs = xs.detach().float()

    def run(call, *extra):
        inputs = [{"x": x} for x in xs.unbind(1)]
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
            outputs, final = call(cell, state, inputs, *extra)
            # the same weights with gradients behind it: casts without gradients must not be remembered
            loss = sum(a.float().sum() for a, _ in outputs) + cell.out(final["m"]).float().sum()
        return loss, torch.autograd.grad(loss, [cell.mix.weight, cell.out.weight, state["m"]])

    (loss, grads), (wanted_loss, wanted) = run(segment_replay, list(cell.parameters())), run(stored)
    assert torch.equal(loss, wanted_loss)
    for a, b in zip(grads, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)  # sums of bfloat16 gradients in another order


def test_checkpointing_inside_and_around():
    cell, state, xs = case(4, 0.3)
    own = list(cell.parameters())

    def inside(s, given):
        return checkpoint(cell, s, given, use_reentrant=False)

    def around(call, state, inputs, *extra):
        return checkpoint(lambda: call(cell, state, inputs, *extra), use_reentrant=False)

    wanted = step_of(stored, cell, state, xs)[2]

    def nested(_cell, state, inputs):
        return segment_replay(inside, state, inputs, own)

    def outer(_cell, state, inputs):
        return around(segment_replay, state, inputs, own)

    for run in (nested, outer):
        for a, b in zip(step_of(run, cell, state, xs)[2], wanted, strict=True):
            if b is not None:
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_parameters_hooks_see_one_whole_gradient():
    cell, state, xs = case(4)
    seen = []
    cell.out.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    outputs, _ = segment_replay(cell, state, [{"x": x} for x in xs.unbind(1)], list(cell.parameters()))
    sum(a.sum() for a, _ in outputs).backward()
    assert len(seen) == 1
    assert torch.equal(seen[0], cell.out.weight.grad)


def test_nothing_stays_of_a_state_that_gets_no_gradient():
    weight = torch.randn(WIDTH, WIDTH, requires_grad=True)

    def step(state, x):
        return x @ weight, torch.softmax(torch.tanh(state + x @ weight), -1)

    def left():
        gc.collect()
        return sum(1 for item in gc.get_objects() if issubclass(type(item), torch.Tensor))

    def run():
        outputs, _ = segment_replay(step, torch.zeros(4, WIDTH), list(torch.randn(3, 4, WIDTH)), [weight])
        sum(out.sum() for out in outputs).backward()
        weight.grad = None

    run()
    before = left()
    for _ in range(3):
        run()
    assert left() == before


def test_hooks_on_gradients_run_once():
    cell, state, xs = case()
    wanted = step_of(segment_replay, cell, state, xs)[2]
    for parameter in cell.mix.parameters():
        parameter.register_hook(lambda grad: grad / 2)
    found = step_of(segment_replay, cell, state, xs)[2]
    for (name, _), now, before in zip([n for n in cell.named_parameters() if n[1].requires_grad], found, wanted):
        if before is not None:
            torch.testing.assert_close(now, before / 2 if name.startswith("mix") else before)


def test_misuse_is_refused():
    cell, state, xs = case(3)

    def loss():
        outputs, _ = segment_replay(cell, state, [{"x": x} for x in xs.unbind(1)], list(cell.parameters()))
        return sum(a.square().sum() for a, _ in outputs)

    found = loss()
    with torch.no_grad():
        cell.out.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified in place between"):
        found.backward()
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(loss(), [cell.out.weight], create_graph=True)
