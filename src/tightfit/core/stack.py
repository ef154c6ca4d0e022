"""Running a stack of blocks under one tape per forward, with the model's own loop untouched.

The model keeps iterating over its ModuleList; each block hands its call to the stack's runner. Replacing or
faking the list is silently wrong on models whose loop gives each block its own mask (Gemma 3) or unpacks tuples
(T5), so the loop stays the model's.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from tightfit.core.errors import StateError, UnsupportedModelError
from tightfit.core.tight import state_of


class StackRunner:
    """What a method does with the blocks of one forward; subclass and override.

    A tape is made per forward, so two forwards before one backward, an exception half-way, or a no-grad forward
    in between cannot mix. A runner that runs a block again must restore random and autocast state itself.
    """

    def open(self, hidden: Any) -> Any:
        """A fresh tape for a forward whose first block receives `hidden`."""
        return None

    def block(self, tape: Any, index: int, last: bool, forward: Any, hidden: Any, args: tuple, kwargs: dict) -> Any:
        """The output of block `index`; `forward(hidden, *args, **kwargs)` is the block's stock forward."""
        return forward(hidden, *args, **kwargs)


class StackState:
    """Shared by the blocks of one stack: the runner and the tape of the forward under way."""

    def __init__(self, runner: StackRunner, length: int):
        self.runner = runner
        self.length = length
        self.tape: Any = None

    def __deepcopy__(self, memo):
        twin = memo[id(self)] = StackState(copy.deepcopy(self.runner, memo), self.length)
        return twin


class StackMixin:
    """Hands a block's call to its stack's runner; the block's own checkpointing is switched off inside."""

    gradient_checkpointing = property(
        lambda self: False, lambda self, value: vars(self).update(gradient_checkpointing=value)
    )

    def forward(self, *args, **kwargs):
        own = state_of(self, StackMixin)  # type: ignore[arg-type]
        stack, index = own["stack"], own["index"]
        stock = super().forward  # type: ignore[misc]
        if torch.is_grad_enabled() and _holds_cache(args, kwargs):
            if self.training:  # type: ignore[attr-defined]
                args, kwargs = _without_cache(args, kwargs, own["number"])
            else:
                stock = _once(stock)
        hidden, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        if index == 0:
            stack.tape = stack.runner.open(hidden)
        last = index == stack.length - 1
        try:
            out = stack.runner.block(stack.tape, index, last, stock, hidden, args, kwargs)
        except BaseException:
            stack.tape = None
            raise
        if last:
            stack.tape = None
        return out


def first_tensor(out: Any, method: str) -> torch.Tensor:
    """The states among what a block returns.

    Raises:
        UnsupportedModelError: it returns a dict (SqueezeBERT).
    """
    if isinstance(out, dict):
        raise UnsupportedModelError(f"{method}: the blocks return a dict of {', '.join(map(str, out))}, not states")
    return out if torch.is_tensor(out) else out[0]


def _is_cache(value: Any) -> bool:
    return any(cls.__name__ == "Cache" for cls in type(value).__mro__)


def _holds_cache(args: tuple, kwargs: dict) -> bool:
    return any(_is_cache(value) for value in (*args, *kwargs.values()))


def _without_cache(args: tuple, kwargs: dict, number: int) -> tuple[tuple, dict]:
    """The call without its KV cache: a block that runs twice would append to it twice, silently."""
    for cache in filter(_is_cache, (*args, *kwargs.values())):
        if cache.get_seq_length(number):
            raise StateError(
                f"a block was called in training with a filled {type(cache).__name__} (prefix tuning fills it); the "
                f"recipe runs the blocks itself and cannot keep a cache. Leave out what fills it"
            )
    plain = {key: None if _is_cache(value) else value for key, value in kwargs.items()}
    if plain.get("use_cache"):
        plain["use_cache"] = False
    return tuple(None if _is_cache(value) else value for value in args), plain


def asked_to_checkpoint(block: nn.Module) -> bool:
    """Whether a block's checkpointing was switched on, which its stack's runner has to see to."""
    return block.training and bool(vars(block).get("gradient_checkpointing", False))


def block_of(forward: Any) -> nn.Module:
    """The block whose stock forward a runner was given."""
    return forward.__self__


def _once(forward):
    """In evaluation the cache is wanted; it is a second run, in a backward pass, that must not touch it."""
    runs: list[bool] = []

    def run(*args, **kwargs):
        if runs:
            raise StateError(
                "a block would run again in the backward pass with a KV cache, and append to it twice; call the model "
                "with use_cache=False, or model.train()"
            )
        runs.append(True)
        return forward(*args, **kwargs)

    run.__self__ = block_of(forward)  # type: ignore[attr-defined]
    return run


def refuse_skipped_blocks(model: nn.Module, blocks: str) -> None:
    """Raise where the model's loop skips blocks at random (LayerDrop): the runner must see every block."""
    for name, module in model.named_modules():
        rate = getattr(module, "layerdrop", 0.0)
        if isinstance(rate, float) and rate > 0 and blocks.startswith(f"{name}." if name else ""):
            raise UnsupportedModelError(
                f"{type(model).__name__}: {name or 'the model'} skips blocks at random (layerdrop={rate}), and a "
                f"stack edit must see every block; set {name or 'model'}.layerdrop = 0.0 before apply()"
            )
