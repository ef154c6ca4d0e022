"""Running a part of a block again as it ran before: its arguments and further outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from tightfit.core.recording import noted_kinds, notes_apart
from tightfit.core.stack import first_tensor


def _flatten(value: Any) -> tuple[list[Any], TreeSpec]:
    return tree_flatten(value, is_leaf=lambda item: not isinstance(item, (tuple, list, dict)))


class Part:
    """A function of the streams with the other arguments of one call; its tensors are handed over apart.

    Attributes:
        tensors: the tensors among the arguments, until they are taken.
        module: what the function runs.
        parameters: what else takes a gradient from it.
        notes: kinds of inner outputs that the model's call asks for.
    """

    def __init__(
        self,
        function: Callable,
        module: nn.Module,
        args: tuple = (),
        kwargs: dict | None = None,
        parameters: Sequence = (),
    ):
        leaves, self.spec = _flatten((args, kwargs or {}))
        self.function, self.module, self.parameters = function, module, parameters
        self.notes = noted_kinds()
        self.leaves = [None if torch.is_tensor(leaf) else leaf for leaf in leaves]
        self.places = [i for i, leaf in enumerate(leaves) if torch.is_tensor(leaf)]
        self.tensors: list[Tensor] = [leaf for leaf in leaves if torch.is_tensor(leaf)]

    def take_tensors(self) -> list[Tensor]:
        """The tensors, which are no longer held here."""
        tensors, self.tensors = self.tensors, []
        return tensors

    def arguments(self, tensors: Sequence[Tensor]) -> Any:
        """(arguments, keyword arguments) of the call, with these tensors."""
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors):
            leaves[place] = tensor
        return tree_unflatten(leaves, self.spec)

    def __call__(self, x: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, Any]:
        """The first of the function's outputs; then the others (None: it gives one tensor) with what it notes, if any.

        A gradient may come from what is noted too (a router's balance loss), so it leaves the part as outputs do.
        """
        args, kwargs = self.arguments(tensors)
        with notes_apart(self.notes) as noted:
            out = self.function(x, *args, **kwargs)
        first, rest = first_tensor(out, "Reversible"), None if torch.is_tensor(out) else tuple(out[1:])
        return first, None if rest is None and not any(noted.values()) else (rest, noted)


class Extras:
    """The form of a part's further outputs: which are new tensors, and which are arguments handed on."""

    def __init__(self, rest: Any, given: Sequence[Tensor]):
        leaves, self.spec = _flatten(rest)
        self.handed_on = {i: j for i, a in enumerate(leaves) for j, b in enumerate(given) if a is b}
        self.places = [i for i, a in enumerate(leaves) if torch.is_tensor(a) and i not in self.handed_on]
        self.leaves = [None if torch.is_tensor(leaf) else leaf for leaf in leaves]

    def made(self, rest: Any) -> list[Tensor]:
        """The new tensors among the outputs of a run of the same form."""
        leaves, _ = _flatten(rest)
        return [leaves[i] for i in self.places]

    def filled(self, made: Sequence[Tensor], given: Sequence[Tensor]) -> Any:
        """The outputs again, of these tensors."""
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, made):
            leaves[place] = tensor
        for place, at in self.handed_on.items():
            leaves[place] = given[at]
        return tree_unflatten(leaves, self.spec)
