"""The parameter edit: another tensor under the same name, while state dicts keep stock keys and shapes."""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn

from tightfit.core import hfmodel
from tightfit.core.edit import Claim, Edit, Handle, is_planning
from tightfit.core.errors import StateError
from tightfit.core.tight import is_tight, loosen, state_of, tighten
from tightfit.core.transform import Slot
from tightfit.ops.autograd import version


class Codec(Protocol):
    """How a parameter's small stand-in and its stock form turn into each other."""

    def encode(self, full: torch.Tensor) -> torch.Tensor:
        """The stand-in for a stock-shaped tensor, or for an optimizer state of that shape; changes nothing."""

    def load(self, full: torch.Tensor) -> torch.Tensor:
        """The stand-in for a stock-shaped tensor from a state dict, which also replaces what the codec remembers."""

    def decode(self, small: torch.Tensor) -> torch.Tensor:
        """The stock-shaped tensor for the stand-in; never on the accelerator."""

    def residue(self) -> torch.Tensor | None:
        """What of the stock tensor the stand-in does not hold."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ParameterEdit(Edit):
    """Another tensor under the same name, on every alias; state dicts keep stock keys and shapes.

    `codec` is called with the stock tensor when the edit runs.
    """

    slot: Slot = Slot.WEIGHTS
    exclusive: bool = True
    aliases: tuple[hfmodel.Alias, ...]
    codec: Callable[[torch.Tensor], Codec]

    @property
    def target(self) -> str:
        return self.aliases[0].name

    def claims(self) -> frozenset[Claim]:
        return frozenset((self.slot, alias.name) for alias in self.aliases)

    def run(self, model: nn.Module) -> Handle:
        return ParameterHandle(self, model)


class StockStateMixin:
    """Writes and reads stock-shaped tensors for attributes that hold a stand-in.

    The expanded tensor is cached per version of the stand-in, so tied modules write one shared tensor.
    """

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        for attribute, held in state_of(self, StockStateMixin)["held"].items():  # type: ignore[arg-type]
            if prefix + attribute in destination:
                destination[prefix + attribute] = held.expanded(getattr(self, attribute))

    def _load_from_state_dict(self, state_dict, prefix, *args):
        given = {}
        try:
            for attribute, held in state_of(self, StockStateMixin)["held"].items():  # type: ignore[arg-type]
                key = prefix + attribute
                if key in state_dict:
                    small = held.shrunk(state_dict[key], getattr(self, attribute))
                    given[key], state_dict[key] = state_dict[key], small
            super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]
        finally:
            state_dict.update(given)


class Held:
    """A codec with a weak memory of the last expansion, so that tied aliases share one tensor."""

    def __init__(self, codec: Codec):
        self.codec = codec
        self._key: tuple | None = None
        self._full: weakref.ref[torch.Tensor] | None = None

    def expanded(self, small: torch.Tensor) -> torch.Tensor:
        """The stock-shaped tensor; the same object as long as neither it nor the stand-in has changed."""
        small = small.detach()
        own = small.to_local() if is_sharded(small) else small  # type: ignore[attr-defined]
        key = (hfmodel.storage_key(own), version(own))
        last = self._full() if self._full is not None else None
        if last is not None and self._key == (*key, version(last)):
            return last
        full = self.codec.decode(whole(small))
        self._full, self._key = weakref.ref(full), (*key, version(full))
        return full

    def shrunk(self, value: torch.Tensor, current: torch.Tensor) -> torch.Tensor:
        """The stand-in for a tensor of a stock-shaped state dict, sharded as `current` is."""
        if is_sharded(value):
            value = value.full_tensor()  # type: ignore[attr-defined]
        small = self.codec.load(value)
        if is_sharded(current):
            from torch.distributed.tensor import distribute_tensor

            return distribute_tensor(small, current.device_mesh, current.placements)  # type: ignore[attr-defined]
        return small

    def __deepcopy__(self, memo):
        twin = memo[id(self)] = Held(self.codec)
        twin.codec = copy.deepcopy(self.codec, memo)
        return twin


def has_sharded(model: nn.Module) -> bool:
    """Whether a parameter of the model is a DTensor."""
    return any(is_sharded(parameter) for parameter in model.parameters())


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether the tensor is a DTensor."""
    return type(tensor).__name__ == "DTensor" or type(tensor.data).__name__ == "DTensor"


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in full where it is sharded, gathered from all processes; else itself."""
    return tensor.detach().full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def gathered(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors in full; what was one memory (tied weights) is one tensor again."""
    found: dict[tuple, torch.Tensor] = {}
    out = {}
    for name, tensor in tensors.items():
        if is_sharded(tensor):
            local = tensor.detach().to_local()  # type: ignore[attr-defined]
            key = (hfmodel.storage_key(local), local.storage_offset(), tensor.shape)
            tensor = found[key] if key in found else found.setdefault(key, whole(tensor))
        out[name] = tensor
    return out


class ParameterHandle(Handle):
    """A stand-in in the place of a stock tensor, which stays aside as an object and comes back on undo."""

    def __init__(self, edit: ParameterEdit, model: nn.Module):
        self.name = edit.target
        self.places = [(model.get_submodule(alias.module_name), alias.attribute) for alias in edit.aliases]
        self.original: torch.Tensor = getattr(*self.places[0])
        self.shape = self.original.shape
        self.committed = False
        if self.original.is_meta and not is_planning():
            raise StateError(
                f"{self.name} is on the meta device: it has no values to keep; load the weights before applying the "
                f"recipe (plan() works on models without weights)"
            )
        codec = edit.codec(self.original.detach())
        self.held = Held(codec)
        small = codec.encode(self.original.detach())
        if isinstance(self.original, nn.Parameter):
            small = nn.Parameter(small, requires_grad=self.original.requires_grad)
        try:
            for module, attribute in self.places:
                if not is_tight(module, StockStateMixin):
                    tighten(module, StockStateMixin, {"held": {}})
                state_of(module, StockStateMixin)["held"][attribute] = self.held
                _put(module, attribute, small)
        except BaseException:
            self._put_back()
            raise

    def commit(self, model: nn.Module) -> None:
        # the object comes back on undo; meanwhile it must not keep the stock-sized memory alive
        self.original.grad = None
        self.original.data = self.original.data.new_empty(0)
        self.committed = True

    def current(self) -> torch.Tensor:
        """The stand-in as it hangs in the model now."""
        return getattr(*self.places[0])

    def undo(self, model: nn.Module) -> None:
        if self.committed:
            small = self.current()
            self.original.data = self.held.expanded(small).to(small.device)
            if isinstance(self.original, nn.Parameter):
                self.original.requires_grad_(small.requires_grad)
        self._put_back()

    def _put_back(self) -> None:
        for module, attribute in self.places:
            held = state_of(module, StockStateMixin)["held"] if is_tight(module, StockStateMixin) else {}
            if held.pop(attribute, None) is None:
                continue
            if not held:
                loosen(module, StockStateMixin)
            _put(module, attribute, self.original)

    def adopt(self, optimizer: torch.optim.Optimizer) -> None:
        """Put the stand-in into the optimizer in the place of the stock parameter, with its rows of the state.

        Raises:
            StateError: the optimizer has packed the state of the stock parameter, which has no rows to take.
        """
        small = self.current()
        for key, value in optimizer.state.get(self.original, {}).items():
            if torch.is_tensor(value) and value.numel() > 1 and not value.is_floating_point():
                raise StateError(
                    f"adopt(): {type(optimizer).__name__} keeps {key!r} of {self.name} packed ({value.dtype}), from "
                    f"which no rows can be taken; make the optimizer after apply, before its first step, with "
                    f"applied.optimizer(...)"
                )
        for group in optimizer.param_groups:
            group["params"] = [small if p is self.original else p for p in group["params"]]
        state = optimizer.state.pop(self.original, None)
        if state is not None:
            optimizer.state[small] = {
                key: self.held.codec.encode(value) if torch.is_tensor(value) and value.shape == self.shape else value
                for key, value in state.items()
            }

    def residue(self) -> dict[str, torch.Tensor]:
        rest = self.held.codec.residue()
        return {} if rest is None else {self.name: rest}


def _put(module: nn.Module, attribute: str, tensor: torch.Tensor) -> None:
    table = module._parameters if attribute in module._parameters else module._buffers
    table[attribute] = tensor  # type: ignore[assignment]
