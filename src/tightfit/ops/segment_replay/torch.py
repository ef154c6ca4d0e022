"""Segment replay: backpropagation through time that keeps the states between steps, and the inside of one step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from tightfit.ops.autograd import inner_gradients, refuse_second_derivative, saved_apart
from tightfit.ops.replay import Replay, own_casts

Step = Callable[[Any, Any], tuple[Any, Any]]


def segment_replay(
    step: Step,
    state: Any,
    inputs: Sequence[Any],
    parameters: Sequence[Tensor] = (),
    *,
    random: bool = False,
    module: nn.Module | None = None,
) -> tuple[list[Any], Any]:
    """Run `step` over all inputs with a state handed on; only the states are kept, each step runs again in backward.

    Values and gradients are those of the plain loop; a step takes 4 forwards' time instead of 3. What is kept: the
    state before every step, the inputs, and what is returned; the inside of one step exists at a time. Random numbers
    and autocast of the second run are those of the first. A step whose outputs, and whose later states, get no gradient
    does not run again.

    Args:
        step: (state, input of this step) -> (output, next state). It must be a function of these two and of the
            parameters: what it changes elsewhere (counts, caches), it changes twice.
        state: the first state: a tensor, or tuples, lists and dicts of tensors and constants. Gradients reach it.
        inputs: of each step, of such a form too. For parts of one tensor use `unbind` or `split`, whose backward is one
            copy; of indexing it is one for each step.
        parameters: what else `step` reads that takes a gradient. Their gradients are returned by this operator, so
            that whatever waits for a parameter's gradient (DDP's reducer) sees one, when it is complete.
        random: the step draws random numbers. A real run notices by itself; one on simulated values needs to be told,
            to count the random states that are kept (5 kB for each step).
        module: what `step` runs; it runs again in the same mode, and with the parameters that were in it.

    Returns:
        (the outputs of all steps, the last state)

    Raises:
        RuntimeError: a parameter has changed between forward and backward, or a second derivative is asked for.

    Example:
        >>> weight = torch.tensor(2.0, requires_grad=True)
        >>> def step(state, x):
        ...     state = torch.tanh(weight * state + x)
        ...     return state.square(), state
        >>> outputs, last = segment_replay(step, torch.zeros(()), torch.ones(3).unbind(), [weight])
        >>> sum(outputs).backward()
        >>> weight.grad > 0
        tensor(True)

    To cut the gradient at a boundary, run the segments on both sides in two calls and detach the state in between.
    """
    leaves, spec = _flatten(state)
    given = [_flatten(part) for part in inputs]
    trained = [p for p in parameters if p.requires_grad]
    everything = [*leaves, *(leaf for part, _ in given for leaf in part), *trained]
    wanted = any(torch.is_tensor(leaf) and leaf.requires_grad for leaf in everything)
    if not given or not wanted or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _loop(step, state, inputs)
    run = _Run(step, (leaves, spec), given, trained, random, module)
    found = _Replayed.apply(run, *run.tensors.pop())
    return run.returned(found)


def _loop(step: Step, state: Any, inputs: Sequence[Any]) -> tuple[list[Any], Any]:
    outputs = []
    for given in inputs:
        out, state = step(state, given)
        outputs.append(out)
    return outputs, state


def _flatten(value: Any) -> tuple[list[Any], TreeSpec]:
    return tree_flatten(value, is_leaf=lambda item: not isinstance(item, (tuple, list, dict)))


class _Form:
    """A tree without its tensors."""

    def __init__(self, leaves: list[Any], spec: TreeSpec):
        self.spec = spec
        self.places = [i for i, leaf in enumerate(leaves) if torch.is_tensor(leaf)]
        self.leaves = [None if torch.is_tensor(leaf) else leaf for leaf in leaves]

    def filled(self, tensors: Sequence[Tensor]) -> Any:
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        return tree_unflatten(leaves, self.spec)


def _taken(value: Any) -> tuple[_Form, list[Tensor]]:
    leaves, spec = _flatten(value)
    return _Form(leaves, spec), [leaf for leaf in leaves if torch.is_tensor(leaf)]


class _Run:
    """One call: its form without tensors, and what a second run of each step needs."""

    def __init__(
        self,
        step: Step,
        state: tuple[list[Any], TreeSpec],
        given: list[tuple[list[Any], TreeSpec]],
        parameters: list[Tensor],
        random: bool,
        module: nn.Module | None,
    ):
        self.step, self.parameters, self.random, self.module = step, parameters, random, module
        self.states = [_Form(*state)]
        self.given = [_Form(*part) for part in given]
        self.outputs: list[_Form] = []
        self.replays: list[Replay] = []
        flat = [leaf for leaves in (state[0], *(part for part, _ in given)) for leaf in leaves if torch.is_tensor(leaf)]
        self.tensors = [[*flat, *parameters]]
        self.versions = [p._version for p in parameters]

    def split(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[list[Tensor]]]:
        """The tensors of the first state, and those of each step's input."""
        sizes = [len(form.places) for form in (self.states[0], *self.given)]
        parts, start = [], 0
        for size in sizes:
            parts.append(list(tensors[start : start + size]))
            start += size
        return parts[0], parts[1:]

    def forward(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """(states between steps, all outputs, last state), and notes the forms of them."""
        now, given = self.split(tensors)
        between: list[Tensor] = []
        outputs: list[Tensor] = []
        device = next((t.device.type for t in tensors), "cpu")
        with own_casts():
            for form, part in zip(self.given, given):
                replay = Replay(device, True, self.module)
                out, state = self.step(self.states[-1].filled(now), form.filled(part))
                replay.settle(draws=self.random, real=_real(tensors))
                self.replays.append(replay)
                out_form, made = _taken(out)
                state_form, now = _taken(state)
                now = [t.detach() for t in now]
                self.outputs.append(out_form)
                self.states.append(state_form)
                outputs += made
                between += now
        return between[: len(between) - len(now)], outputs, now

    def returned(self, found: Sequence[Tensor]) -> tuple[list[Any], Any]:
        """Outputs and last state, in the caller's form."""
        outs, at = [], 0
        for form in self.outputs:
            outs.append(form.filled(found[at : at + len(form.places)]))
            at += len(form.places)
        return outs, self.states[-1].filled(found[at:])

    def check(self) -> None:
        """Raise where a parameter is not what it was in the forward."""
        if [p._version for p in self.parameters] != self.versions:
            raise RuntimeError(
                "segment_replay: a parameter was modified in place between forward and backward (an optimizer step?); "
                "the steps cannot run again as they ran"
            )


def _real(tensors: Sequence[Tensor]) -> bool:
    return not any(t.is_meta or type(t).__name__ == "FakeTensor" for t in tensors)


def _alone(tensor: Tensor, others: set[int]) -> Tensor:
    """A tensor fit to be returned: no view, and none that was given or is returned already."""
    if id(tensor) in others:
        tensor = tensor.clone()
    others.add(id(tensor))
    empty: Any = tensor.new_empty(0)
    return tensor if tensor._base is None else empty.set_(tensor)


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run, *tensors):
        between, outputs, last = run.forward(tensors)
        ctx.run, ctx.count = run, len(tensors) - len(run.parameters)
        ctx.save_for_backward(*tensors[: ctx.count], *between)
        ctx.set_materialize_grads(False)
        seen = {id(t) for t in tensors}
        returned = tuple(_alone(t, seen) for t in (*outputs, *last))
        ctx.mark_non_differentiable(*(t for t in returned if not _differentiable(t)))
        return returned

    @staticmethod
    def backward(ctx, *grads):
        refuse_second_derivative("segment_replay")
        run: _Run = ctx.run
        run.check()
        saved = ctx.saved_tensors
        first, given = run.split(saved[: ctx.count])
        states = [first]
        at = ctx.count
        for form in run.states[1:-1]:
            states.append(list(saved[at : at + len(form.places)]))
            at += len(form.places)
        del saved
        needs = ctx.needs_input_grad[1:]
        needs_first, needs_given = run.split(needs)
        sums = _Sums(len(run.parameters))
        of_given: list[list[Tensor | None]] = [[None] * len(part) for part in given]
        end = len(grads) - len(run.states[-1].places)
        pulled = list(grads[end:])
        for t in reversed(range(len(given))):
            start = end - len(run.outputs[t].places)
            pull, end = [*grads[start:end], *pulled], start
            wants = needs_first if t == 0 else [True] * len(states[t])
            pulled, of_given[t], found = _again(run, t, states.pop(), wants, given[t], needs_given[t], pull)
            sums.add(found)
        flat = [grad for part in of_given for grad in part]
        return None, *pulled, *flat, *sums.total


def _differentiable(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _leaf(tensor: Tensor, wanted: bool) -> Tensor:
    return tensor.detach().requires_grad_(wanted and _differentiable(tensor))


def _again(run: _Run, t: int, state, wants, given, needs, pull):
    """One step with a graph; the gradients of its state, of its input, and of the parameters."""
    nothing = [None] * len(state), [None] * len(given), [None] * len(run.parameters)
    if all(grad is None for grad in pull):
        return nothing
    state = [_leaf(tensor, want) for tensor, want in zip(state, wants)]
    given = [_leaf(tensor, need) for tensor, need in zip(given, needs)]
    with torch.enable_grad(), run.replays[t].again(), saved_apart():
        out, after = run.step(run.states[t].filled(state), run.given[t].filled(given))
    made = [*_taken(out)[1], *_taken(after)[1]]
    del out, after
    pairs = [(x, grad) for x, grad in zip(made, pull, strict=True) if grad is not None and x.requires_grad]
    tensors = [*state, *given, *run.parameters]
    wanted = [x for x in tensors if x.requires_grad]
    if not pairs or not wanted:
        return nothing
    roots, grads = zip(*pairs)
    del made, pairs
    found = iter(inner_gradients(roots, wanted, grads))
    every = [next(found) if x.requires_grad else None for x in tensors]
    a, b = len(state), len(state) + len(given)
    return every[:a], every[a:b], every[b:]


class _Sums:
    """Gradients added up; what autograd gave is not written to, because two of them may be one tensor."""

    def __init__(self, count: int):
        self.total: list[Tensor | None] = [None] * count
        self.own = [False] * count

    def add(self, found: Sequence[Tensor | None]) -> None:
        for i, grad in enumerate(found):
            if grad is None:
                continue
            known = self.total[i]
            if known is None:
                self.total[i] = grad
            elif self.own[i]:
                known.add_(grad)
            else:
                self.total[i], self.own[i] = known + grad, True
