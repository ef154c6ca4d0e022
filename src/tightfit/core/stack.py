"""Running a stack of blocks under one tape per forward, with the model's own loop untouched.

The model keeps iterating over its ModuleList; each block hands its call to the stack's runner. Replacing or
faking the list is silently wrong on models whose loop gives each block its own mask (Gemma 3) or unpacks tuples
(T5), so the loop stays the model's.
"""

from __future__ import annotations

from typing import Any

from tightfit.core.tight import state_of


class StackRunner:
    """What a method does with the blocks of one forward; subclass and override.

    A tape is made per forward, so two forwards before one backward, an exception half-way, or a no-grad forward
    in between cannot mix.
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
        import copy

        twin = StackState(copy.deepcopy(self.runner, memo), self.length)
        memo[id(self)] = twin
        return twin


class StackMixin:
    """Hands a block's call to its stack's runner; the block's own checkpointing is switched off inside."""

    gradient_checkpointing = property(lambda self: False, lambda self, value: None)

    def forward(self, hidden, *args, **kwargs):
        own = state_of(self, StackMixin)  # type: ignore[arg-type]
        stack, index = own["stack"], own["index"]
        if index == 0:
            stack.tape = stack.runner.open(hidden)
        last = index == stack.length - 1
        try:
            return stack.runner.block(
                stack.tape,
                index,
                last,
                super().forward,
                hidden,
                args,
                kwargs,  # type: ignore[misc]
            )
        finally:
            if last:
                stack.tape = None
