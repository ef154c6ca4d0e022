"""What every edit has in common: the edit as data, the handle of an executed one, the living part of a method."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from tightfit.core.transform import Slot

Claim = tuple[Slot, str]

_planning: contextvars.ContextVar[bool] = contextvars.ContextVar("planning", default=False)


@contextlib.contextmanager
def planning():
    """While active, edits may run on a model without weights: nothing is trained, only counted."""
    token = _planning.set(True)
    try:
        yield
    finally:
        _planning.reset(token)


def is_planning() -> bool:
    """Whether edits run on a planner's copy."""
    return _planning.get()


class Part:
    """The living side of one applied transform; every hook is optional.

    A method that needs more than its edits (a host store, a callback, numbers for the report) puts one `Part`
    into them; `Applied` finds it there.

    Attributes:
        in_model_state: the model's own state dict holds its tensors too.
    """

    in_model_state: ClassVar[bool] = False

    def report(self) -> dict[str, Any]:
        """Facts for `Applied.report()`."""
        return {}

    def callback(self) -> Any | None:
        """A `transformers.TrainerCallback`, or None where the method needs none."""
        return None

    def tensors(self) -> dict[str, torch.Tensor]:
        """Tensors beside the model's own that `Applied.save` must keep."""
        return {}

    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take back what `tensors` gave."""

    def training_tensors(self) -> dict[str, torch.Tensor]:
        """What only a run that goes on needs, beside `tensors` (optimizer state that no optimizer holds)."""
        return {}

    def load_training_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take back what `training_tensors` gave, after `load_tensors`."""

    def host_bytes(self) -> int:
        """Bytes of host-side stores, which no allocator counts."""
        return 0

    def recipe_fields(self) -> dict[str, Any]:
        """Fields of the transform that changed since it was applied (a kept set that has grown, say)."""
        return {}

    def optimizer_made(self, optimizer: torch.optim.Optimizer) -> None:
        """Called with every optimizer made over the model's parameters."""


def part_tensors(parts: Iterable[Part]) -> dict[str, torch.Tensor]:
    """What parts keep, for a result and for training, by part, kind and name."""
    return {
        f"{type(part).__name__}/{kind}/{key}": tensor
        for part in parts
        for kind, tensors in (("tensors", part.tensors()), ("training", part.training_tensors()))
        for key, tensor in tensors.items()
    }


def load_part_tensors(parts: Iterable[Part], state: Mapping[str, torch.Tensor]) -> None:
    """Give parts back what `part_tensors` gave, among whatever else; a part of which nothing is there keeps its own."""
    for part in parts:
        for kind, load in (("tensors", part.load_tensors), ("training", part.load_training_tensors)):
            prefix = f"{type(part).__name__}/{kind}/"
            found = {key.removeprefix(prefix): t for key, t in state.items() if key.startswith(prefix)}
            if found:
                load(found)


class Picker(Part):
    """The part of a method that leaves tokens out of a training step's graph, and forms the loss over the others.

    One that calls the model with more tokens than the user gave, or runs it again in backward, asks it.
    """

    @property
    def picks(self) -> bool:
        """Whether tokens are left out at all."""
        return True

    def keep(self, positions: torch.Tensor, real: torch.Tensor) -> None:
        """Before a call: (B, n) the tokens that must not be left out, (B, L) which ones are no padding."""
        raise NotImplementedError

    def places(self, positions: torch.Tensor) -> torch.Tensor | None:
        """After a call: where tokens (B, n) stand among the rows that it returned; None where it returned all."""
        raise NotImplementedError

    def draws(self) -> Any:
        """What the next call's choice depends on beside torch's generators."""
        raise NotImplementedError

    def restore_draws(self, state: Any) -> None:
        """Put back what `draws` gave, so that the next call chooses the same again."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Edit:
    """Base of all edits. `claims` are the (slot, place) pairs it uses; two exclusive claims conflict."""

    slot: Slot
    exclusive: bool = False
    note: str = ""
    part: Part | None = None

    @property
    def target(self) -> str:
        raise NotImplementedError

    def claims(self) -> frozenset[Claim]:
        return frozenset({(self.slot, self.target)})

    def run(self, model: nn.Module) -> Handle:
        raise NotImplementedError


class Handle:
    """An executed edit. Making one must be all or nothing: what raises half-way takes back its own first half."""

    def undo(self, model: nn.Module) -> None:
        """Take the edit off; the rest of the model stays as it is."""
        raise NotImplementedError

    def commit(self, model: nn.Module) -> None:
        """Called once all edits of the recipe have run: let go of what only a failed `apply` would need."""

    def before_merge(self, model: nn.Module, verb: str) -> None:
        """Raise where stock parameters cannot hold the result; called before `verb` (merge, export) does anything."""

    def merge(self, model: nn.Module) -> None:
        """Take the edit off and leave its result in the stock parameters."""
        self.undo(model)

    def stock_state(self, model: nn.Module, state: dict[str, torch.Tensor]) -> None:
        """Rewrite a state dict in place to stock names, shapes and merged values; the model is not touched."""

    def residue(self) -> dict[str, torch.Tensor]:
        """Parts of stock tensors that training cannot change but the result depends on (for the base check)."""
        return {}


class Unchanged(Handle):
    """The handle of an edit that changes nothing."""

    def undo(self, model: nn.Module) -> None:
        """There is nothing to undo."""
