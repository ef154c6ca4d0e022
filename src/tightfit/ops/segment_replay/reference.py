"""The readable loop, for tests: stored backpropagation through time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


def segment_replay(step: Callable[[Any, Any], tuple[Any, Any]], state: Any, inputs: Sequence[Any]) -> tuple[list, Any]:
    """The outputs of all steps, and the last state; autograd keeps whatever every step keeps."""
    outputs = []
    for given in inputs:
        out, state = step(state, given)
        outputs.append(out)
    return outputs, state
