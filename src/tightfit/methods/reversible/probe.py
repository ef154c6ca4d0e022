"""A look at a model's blocks before they are taken over: how large states get, whether blocks repeat bit by bit."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from tightfit.core import hfmodel
from tightfit.core.artifacts import config_kept
from tightfit.core.errors import SimulationError, StateError, TightfitError, UnsupportedModelError
from tightfit.core.simulate.batches import example_batch
from tightfit.ops.replay import Replay

ROWS, TOKENS = 2, 12

Check = Callable[[str, nn.Module, Any, tuple, dict, Any], None]


class UntriedError(UnsupportedModelError):
    """The model could not be run on an example."""


@dataclasses.dataclass
class Findings:
    """What a probe found.

    Attributes:
        largest: largest magnitude of a state.
        unstable: names of blocks whose second run gives other bits than the first.
    """

    largest: float = 0.0
    unstable: list[str] = dataclasses.field(default_factory=list)


def probe(model: nn.Module, stacks: Sequence[Sequence[str]], check: Check | None = None) -> Findings:
    """Run the model once on an example batch, every block twice.

    Args:
        stacks: names of the blocks, in the order in which they are called.
        check: called with (name, block, states, other arguments, keyword arguments, output) of every block.

    Raises:
        UntriedError: no batch is known for the model, or it does not run on the one that is.
        UnsupportedModelError: a block changes the shape of the states, the model changes them between two blocks, or it
            runs the blocks in turns.
        StateError: the states are not finite.
    """
    try:
        batch = example_batch(model, ROWS, TOKENS)
    except (SimulationError, AttributeError) as error:
        raise _untried(model, error) from error
    device = next(model.parameters()).device
    call: dict[str, Any] = {key: value.to(device) for key, value in batch.items()}
    if getattr(getattr(model, "config", None), "use_cache", None):
        call["use_cache"] = False
    findings = Findings()
    devices = [device] if device.type == "cuda" else []
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.enter_context(torch.no_grad())
        stack.enter_context(config_kept(model))
        for blocks in stacks:
            stack.enter_context(_watched(model, blocks, findings, check))
        try:
            model(**call)
        except TightfitError:
            raise
        except Exception as error:  # the model wants something else than the example
            raise _untried(model, error) from error
    return findings


def _untried(model: nn.Module, error: Exception) -> UntriedError:
    return UntriedError(
        f"Reversible: {type(model).__name__} could not be tried on an example batch before it is changed "
        f"({type(error).__name__}: {error}); give the bits behind the point yourself, such as Reversible(bits=20)"
    )


@contextlib.contextmanager
def _watched(model: nn.Module, blocks: Sequence[str], findings: Findings, check: Check | None) -> Iterator[None]:
    handles, before = [], {}
    last: dict[str, Any] = {}

    def enter(name: str):
        def hook(module, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            before[name] = Replay(hidden.device.type, random=True)

        return hook

    def leave(name: str, at: int):
        def hook(module, args, kwargs, out):
            if at <= last.get("at", -1) < len(blocks) - 1:
                raise UnsupportedModelError(
                    f"Reversible: {type(model).__name__} runs {name} after {blocks[last['at']]}, but a stack must run "
                    f"from its first block to its last (ALBERT with several groups runs each of them several times)"
                )
            last["at"] = at
            hidden, others, named = split_call(args, kwargs)
            state = out if torch.is_tensor(out) else out[0]
            if state.shape != hidden.shape:
                raise UnsupportedModelError(
                    f"Reversible: block {name} changes the shape of the states from {tuple(hidden.shape)} to "
                    f"{tuple(state.shape)}; leave it out with span=..."
                )
            if at and hfmodel.storage_key(hidden) != last["key"]:
                raise UnsupportedModelError(
                    f"Reversible: {type(model).__name__} changes the states between its blocks, before {name}; leave "
                    f"that place out with span=..."
                )
            largest = float(torch.stack([hidden.abs().max(), state.abs().max()]).max())
            if not largest < float("inf"):
                raise StateError(f"Reversible: the model's own states are not finite at block {name}")
            findings.largest = max(findings.largest, largest)
            with before.pop(name).again():
                again = module.forward(*args, **kwargs)
            if not torch.equal(again if torch.is_tensor(again) else again[0], state):
                findings.unstable.append(name)
            if check is not None:
                check(name, module, hidden, others, named, state)
            last["key"] = hfmodel.storage_key(state)
            last["state"] = state  # held, so that no other tensor gets its storage

        return hook

    try:
        for at, name in enumerate(blocks):
            block = model.get_submodule(name)
            handles.append(block.register_forward_pre_hook(enter(name), with_kwargs=True))
            handles.append(block.register_forward_hook(leave(name, at), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def split_call(args: tuple, kwargs: dict) -> tuple[Any, tuple, dict]:
    """(states, other arguments, keyword arguments) of a block's call."""
    if args:
        return args[0], args[1:], kwargs
    named = dict(kwargs)
    return named.pop("hidden_states"), (), named
