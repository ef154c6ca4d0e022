"""Running a part of a block again as it ran before: arguments, random state and autocast."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from tightfit.ops.recompute import random_state, set_random_state


def _flatten(value: Any) -> tuple[list[Any], TreeSpec]:
    return tree_flatten(value, is_leaf=lambda item: not isinstance(item, (tuple, list, dict)))


class Part:
    """A function of the streams with the other arguments of one call; its tensors are handed over apart.

    Attributes:
        tensors: the tensors among the arguments, until they are taken.
        parameters: what else takes a gradient from it.
    """

    def __init__(self, function: Callable, args: tuple = (), kwargs: dict | None = None, parameters: Sequence = ()):
        leaves, self.spec = _flatten((args, kwargs or {}))
        self.function, self.parameters = function, parameters
        self.leaves = [None if torch.is_tensor(leaf) else leaf for leaf in leaves]
        self.places = [i for i, leaf in enumerate(leaves) if torch.is_tensor(leaf)]
        self.tensors: list[Tensor] = [leaf for leaf in leaves if torch.is_tensor(leaf)]

    def take_tensors(self) -> list[Tensor]:
        """The tensors, which are no longer held here."""
        tensors, self.tensors = self.tensors, []
        return tensors

    def __call__(self, x: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, Any]:
        """The first of the function's outputs, and the others (None where it gives one tensor)."""
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors):
            leaves[place] = tensor
        args, kwargs = tree_unflatten(leaves, self.spec)
        out = self.function(x, *args, **kwargs)
        return (out, None) if torch.is_tensor(out) else (out[0], tuple(out[1:]))


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


def drops(module: nn.Module) -> bool:
    """Whether anything in a module drops at random now, going by its settings."""
    for part in module.modules():
        if not part.training:
            continue
        rates = [value for key, value in vars(part).items() if "drop" in key and isinstance(value, float)]
        if isinstance(part, nn.modules.dropout._DropoutNd):
            rates.append(part.p)
        if any(rate > 0 for rate in rates):
            return True
    return False


def _moved(kind: str, state: Tensor) -> bool:
    return not torch.equal(state, random_state(kind))


class Replay:
    """Random and autocast state as they are now.

    Args:
        device_type: where the part runs.
        random: whether it may draw random numbers.
    """

    def __init__(self, device_type: str, random: bool):
        self.kinds = list(dict.fromkeys((device_type, "cpu")))
        self.autocast = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in self.kinds
            if torch.amp.is_autocast_available(kind)
        ]
        self.cache = torch.is_autocast_cache_enabled()
        self.random = {kind: random_state(kind) for kind in self.kinds} if random else {}

    def settle(self, draws: bool, real: bool) -> None:
        """The run is over: let go of the random state where no number was drawn.

        Args:
            draws: numbers are drawn, going by the settings.
            real: the run drew where it draws; a simulated one does not.
        """
        if not draws and not (real and any(_moved(kind, state) for kind, state in self.random.items())):
            self.random = {}

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """The same states for one run; what they were outside is put back."""
        before = {kind: random_state(kind) for kind in self.random}
        with contextlib.ExitStack() as stack:
            for kind, enabled, dtype in self.autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=self.cache))
            for kind, state in self.random.items():
                set_random_state(kind, state)
            try:
                yield
            finally:
                for kind, state in before.items():
                    set_random_state(kind, state)
