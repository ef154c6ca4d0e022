"""The kinds of edit: what a method may do to a model, as data that can be listed, checked and undone.

`ParameterEdit` puts another tensor under the same name on every alias; `ModuleEdit` gives one module another
forward; `StackEdit` takes over how a stack of blocks is run; `CallEdit` wraps the call of the model or of its
backbone. `TrainableEdit` switches gradients on and off. An edit is inert until the core runs it; running
returns a `Handle` that can undo it, merge it, and say what must be saved.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import dataclasses
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import nn

from tightfit.core import hfmodel
from tightfit.core.errors import StateError, UnsupportedModelError
from tightfit.core.stack import StackMixin, StackRunner, StackState
from tightfit.core.tight import is_tight, loosen, state_of, tighten
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
    """

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

    def host_bytes(self) -> int:
        """Bytes of host-side stores, which no allocator counts."""
        return 0

    def recipe_fields(self) -> dict[str, Any]:
        """Fields of the transform that changed since it was applied (a kept set that has grown, say)."""
        return {}

    def optimizer_made(self, optimizer: torch.optim.Optimizer) -> None:
        """Called with every optimizer made over the model's parameters."""


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
    """An executed edit."""

    def undo(self, model: nn.Module) -> None:
        """Take the edit off; the rest of the model stays as it is."""
        raise NotImplementedError

    def merge(self, model: nn.Module) -> None:
        """Take the edit off and leave its result in the stock parameters."""
        self.undo(model)

    def stock_state(self, model: nn.Module, state: dict[str, torch.Tensor]) -> None:
        """Rewrite a state dict in place to stock names, shapes and merged values; the model is not touched."""

    def residue(self) -> dict[str, torch.Tensor]:
        """Parts of stock tensors that training cannot change but the result depends on (for the base check)."""
        return {}


# -- parameter edit ---------------------------------------------------------------------------------------------


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
        replaced = {}
        for attribute, held in state_of(self, StockStateMixin)["held"].items():  # type: ignore[arg-type]
            key = prefix + attribute
            if key in state_dict:
                replaced[key] = state_dict[key]
                state_dict[key] = held.shrunk(state_dict[key], getattr(self, attribute))
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]
        state_dict.update(replaced)


class Held:
    """A codec with a weak memory of the last expansion, so that tied aliases share one tensor."""

    def __init__(self, codec: Codec):
        self.codec = codec
        self._key: tuple | None = None
        self._full: weakref.ref[torch.Tensor] | None = None

    def expanded(self, small: torch.Tensor) -> torch.Tensor:
        small = small.detach()
        if type(small).__name__ == "DTensor":
            small = small.full_tensor()  # type: ignore[attr-defined]
        last = self._full() if self._full is not None else None
        if last is not None and self._key == (hfmodel.storage_key(small), small._version, last._version):
            return last
        full = self.codec.decode(small)
        self._full, self._key = weakref.ref(full), (hfmodel.storage_key(small), small._version, full._version)
        return full

    def shrunk(self, value: torch.Tensor, current: torch.Tensor) -> torch.Tensor:
        if type(value).__name__ == "DTensor":
            value = value.full_tensor()  # type: ignore[attr-defined]
        small = self.codec.load(value)
        if type(current).__name__ == "DTensor":
            from torch.distributed.tensor import distribute_tensor

            return distribute_tensor(small, current.device_mesh, current.placements)  # type: ignore[attr-defined]
        return small

    def __deepcopy__(self, memo):
        twin = memo[id(self)] = Held(copy.deepcopy(self.codec, memo))
        return twin


class ParameterHandle(Handle):
    def __init__(self, edit: ParameterEdit, model: nn.Module):
        self.aliases = edit.aliases
        first = edit.aliases[0]
        self.original = getattr(model.get_submodule(first.module_name), first.attribute)
        if self.original.is_meta and not is_planning():
            raise StateError(
                f"{first.name} is on the meta device: it has no values to keep; load the weights before applying the "
                f"recipe (plan() works on models without weights)"
            )
        codec = edit.codec(self.original.detach())
        self.held = Held(codec)
        small = codec.encode(self.original.detach())
        if isinstance(self.original, nn.Parameter):
            small = nn.Parameter(small, requires_grad=self.original.requires_grad)
        for alias in self.aliases:
            module = model.get_submodule(alias.module_name)
            _put(module, alias.attribute, small)
            if not is_tight(module, StockStateMixin):
                tighten(module, StockStateMixin, {"held": {}})
            state_of(module, StockStateMixin)["held"][alias.attribute] = self.held
        # the object comes back on undo; meanwhile it must not keep the stock-sized memory alive
        self.original.grad = None
        self.original.data = self.original.data.new_empty(0)

    def current(self, model: nn.Module) -> torch.Tensor:
        """The stand-in as it hangs in the model now."""
        alias = self.aliases[0]
        return getattr(model.get_submodule(alias.module_name), alias.attribute)

    def undo(self, model: nn.Module) -> None:
        small = self.current(model)
        full = self.held.expanded(small).to(small.device)
        self.original.data = full
        if isinstance(self.original, nn.Parameter):
            self.original.requires_grad_(small.requires_grad)
        for alias in self.aliases:
            module = model.get_submodule(alias.module_name)
            held = state_of(module, StockStateMixin)["held"]
            del held[alias.attribute]
            if not held:
                loosen(module, StockStateMixin)
            _put(module, alias.attribute, self.original)

    def adopt(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Put the stand-in into the optimizer in the place of the stock parameter, with its rows of the state."""
        small = self.current(model)
        for group in optimizer.param_groups:
            group["params"] = [small if p is self.original else p for p in group["params"]]
        state = optimizer.state.pop(self.original, None)
        if state is not None:
            full_shape = self.held.expanded(small).shape
            optimizer.state[small] = {
                key: self.held.codec.encode(value) if torch.is_tensor(value) and value.shape == full_shape else value
                for key, value in state.items()
            }

    def residue(self) -> dict[str, torch.Tensor]:
        rest = self.held.codec.residue()
        return {} if rest is None else {self.aliases[0].name: rest}


def _put(module: nn.Module, attribute: str, tensor: torch.Tensor) -> None:
    table = module._parameters if attribute in module._parameters else module._buffers
    table[attribute] = tensor  # type: ignore[assignment]


# -- module edit ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ModuleEdit(Edit):
    """Give one module another forward by an in-place subclass; several on one module stack."""

    slot: Slot = Slot.OPERATORS
    module: str
    mixin: type
    state: Callable[[nn.Module], dict[str, Any]] | None = None

    @property
    def target(self) -> str:
        return self.module or "(model)"

    def run(self, model: nn.Module) -> Handle:
        module = model.get_submodule(self.module)
        return _MixinHandle([(self.module, module)], self.mixin, self.state)


class _MixinHandle(Handle):
    def __init__(self, modules, mixin: type, state: Callable[[nn.Module], dict[str, Any]] | None):
        self.mixin = mixin
        self.modules: list[nn.Module] = []
        try:
            for _, module in modules:
                tighten(module, mixin, state(module) if state else {})
                self.modules.append(module)
        except Exception:
            self.undo(None)
            raise

    def undo(self, model: nn.Module | None) -> None:
        for module in reversed(self.modules):
            # a merged adapter layer takes our edit with it when the layer itself is dropped
            if is_tight(module, self.mixin):
                loosen(module, self.mixin)
        self.modules = []


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class CallEdit(Edit):
    """Wrap the call of the model (`where="model"`) or of its backbone (`where="backbone"`).

    The mixin overrides `forward` where the caller is the model itself, or `__call__` where a trainer may have
    replaced the instance's `forward`.
    """

    slot: Slot = Slot.INPUTS
    where: str = "backbone"
    mixin: type
    state: Callable[[nn.Module], dict[str, Any]] | None = None

    @property
    def target(self) -> str:
        return f"({self.where})"

    def run(self, model: nn.Module) -> Handle:
        if self.where not in ("model", "backbone"):
            raise ValueError(f"CallEdit(where=...): got {self.where!r}, accepted is 'model' or 'backbone'")
        place = ("", model) if self.where == "model" else hfmodel.backbone(model)
        return _MixinHandle([place], self.mixin, self.state)


# -- stack edit -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StackEdit(Edit):
    """Take over how a stack of blocks is run: the runner sees every block of a forward, with one tape.

    It claims the blocks' recomputation too, because a block that is run by a tape must not also be checkpointed.
    """

    slot: Slot = Slot.BLOCKS
    exclusive: bool = True
    blocks: tuple[str, ...]
    runner: Callable[[], StackRunner]

    @property
    def target(self) -> str:
        first, last = self.blocks[0], self.blocks[-1].rsplit(".", 1)[-1]
        return first if len(self.blocks) == 1 else f"{first}..{last}"

    def claims(self) -> frozenset[Claim]:
        return frozenset((slot, block) for block in self.blocks for slot in (self.slot, Slot.RECOMPUTE))

    def run(self, model: nn.Module) -> Handle:
        shared = StackState(self.runner(), len(self.blocks))
        modules = [(name, model.get_submodule(name)) for name in self.blocks]
        index = {id(module): i for i, (_, module) in enumerate(modules)}
        if len(index) != len(modules):
            raise UnsupportedModelError(
                f"{type(model).__name__}: the blocks {self.target} are one shared module (as in ALBERT); "
                f"a stack edit needs distinct blocks"
            )
        return _MixinHandle(modules, StackMixin, lambda m: {"stack": shared, "index": index[id(m)]})


# -- trainable edit ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TrainableEdit(Edit):
    """Switch `requires_grad` of the named stock parameters."""

    slot: Slot = Slot.TRAINABLE
    parameters: tuple[str, ...]
    trainable: bool

    @property
    def target(self) -> str:
        return f"{len(self.parameters)} parameters"

    def claims(self) -> frozenset[Claim]:
        return frozenset((self.slot, name) for name in self.parameters)

    def run(self, model: nn.Module) -> Handle:
        # the parameter objects may already be stand-ins, so look them up by name now
        return _TrainableHandle(model, self.parameters, self.trainable)


class _TrainableHandle(Handle):
    def __init__(self, model: nn.Module, names: Iterable[str], trainable: bool):
        self.before: dict[str, bool] = {}
        for name in names:
            parameter = model.get_parameter(name)
            self.before[name] = parameter.requires_grad
            parameter.requires_grad_(trainable)

    def undo(self, model: nn.Module) -> None:
        for name, flag in self.before.items():
            model.get_parameter(name).requires_grad_(flag)
