"""The kinds of edit: what a method may do to a model, as data that can be listed, checked and undone.

`ParameterEdit` puts another tensor under the same name on every alias; `ModuleEdit` gives one module another
forward; `StackEdit` takes over how a stack of blocks is run; `CallEdit` wraps the call of the model or of its
backbone. `TrainableEdit` switches gradients on and off, `ChildEdit` adds a module with parameters of its own. An
edit is inert until the core runs it; running returns a `Handle` that can undo it, merge it, and say what must be
saved.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from tightfit.core import hfmodel
from tightfit.core.edit import Claim, Edit, Handle, Part, Unchanged, is_planning, planning
from tightfit.core.errors import StateError, UnsupportedModelError
from tightfit.core.fields import check_choice
from tightfit.core.parameter import Codec, ParameterEdit, ParameterHandle
from tightfit.core.stack import StackMixin, StackRunner, StackState, refuse_skipped_blocks
from tightfit.core.tight import is_tight, loosen, tighten
from tightfit.core.transform import Slot

__all__ = [
    "CallEdit",
    "ChildEdit",
    "Claim",
    "Codec",
    "Edit",
    "Handle",
    "ModuleEdit",
    "ModulesEdit",
    "ParameterEdit",
    "ParameterHandle",
    "Part",
    "StackEdit",
    "StackRunner",
    "TrainableEdit",
    "is_planning",
    "planning",
]

State = Callable[[nn.Module], dict[str, Any]] | None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ModuleEdit(Edit):
    """Give one module another forward by an in-place subclass; several on one module stack."""

    slot: Slot = Slot.OPERATORS
    module: str
    mixin: type
    state: State = None

    @property
    def target(self) -> str:
        return self.module or "(model)"

    def run(self, model: nn.Module) -> Handle:
        return _MixinHandle([hfmodel.stock_module(model, self.module)], self.mixin, self.state)


class _MixinHandle(Handle):
    def __init__(self, modules: Iterable[nn.Module], mixin: type, state: State):
        self.mixin = mixin
        self.modules: list[nn.Module] = []
        try:
            for module in modules:
                tighten(module, mixin, state(module) if state else {})
                self.modules.append(module)
        except BaseException:
            self.undo(None)
            raise

    def undo(self, model: nn.Module | None) -> None:
        for module in reversed(self.modules):
            # a merged adapter layer takes our edit with it when the layer itself is dropped
            if is_tight(module, self.mixin):
                loosen(module, self.mixin)
        self.modules = []


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ModulesEdit(Edit):
    """Give every module of one kind another forward, also those that the recipe's adapters have added.

    `find` gets the model as it is when the edit runs, and returns its modules with the state of each. Where `shared`,
    modules that another edit of the recipe has given this form keep it. `places` are the stock names of the modules,
    where two methods must not change the same one.
    """

    slot: Slot = Slot.OPERATORS
    kind: str
    mixin: type
    find: Callable[[nn.Module], list[tuple[nn.Module, dict[str, Any]]]]
    shared: bool = False
    places: tuple[str, ...] = ()

    @property
    def target(self) -> str:
        return f"({self.kind})"

    def claims(self) -> frozenset[Claim]:
        return frozenset((self.slot, place) for place in self.places) or super().claims()

    def run(self, model: nn.Module) -> Handle:
        found = [(m, s) for m, s in self.find(model) if not (self.shared and is_tight(m, self.mixin))]
        states = {id(module): state for module, state in found}
        return _MixinHandle([module for module, _ in found], self.mixin, lambda module: states[id(module)])


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class CallEdit(Edit):
    """Wrap the call of the model (`where="model"`) or of its backbone (`where="backbone"`; see `hfmodel.runner`).

    The mixin overrides `forward` where the caller is the model itself, or `__call__` where a trainer may have
    replaced the instance's `forward`.
    """

    slot: Slot = Slot.INPUTS
    where: str = "backbone"
    mixin: type
    state: State = None

    def __post_init__(self) -> None:
        check_choice(self, "where", ("model", "backbone"))

    @property
    def target(self) -> str:
        return f"({self.where})"

    def run(self, model: nn.Module) -> Handle:
        module = model if self.where == "model" else hfmodel.runner(model)[1]
        return _MixinHandle([module], self.mixin, self.state)


# -- stack edit -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StackEdit(Edit):
    """Take over how a stack of blocks is run: the runner sees every block of a forward, with one tape.

    It claims the blocks' recomputation too, because a block that is run by a tape must not also be checkpointed; but
    not where the runner checkpoints blocks itself (`checkpoints`) when `asked_to_checkpoint` says so.
    """

    slot: Slot = Slot.BLOCKS
    exclusive: bool = True
    blocks: tuple[str, ...]
    runner: Callable[[], StackRunner]
    checkpoints: bool = False

    @property
    def target(self) -> str:
        first, last = self.blocks[0], self.blocks[-1].rsplit(".", 1)[-1]
        return first if len(self.blocks) == 1 else f"{first}..{last}"

    def claims(self) -> frozenset[Claim]:
        slots = (self.slot,) if self.checkpoints else (self.slot, Slot.RECOMPUTE)
        return frozenset((slot, block) for block in self.blocks for slot in slots)

    def make_runner(self) -> StackRunner:
        """The runner of the stack, made when the edit runs."""
        return self.runner()

    def run(self, model: nn.Module) -> Handle:
        modules = [model.get_submodule(name) for name in self.blocks]
        if len({id(module) for module in modules}) != len(modules):
            raise UnsupportedModelError(
                f"{type(model).__name__}: the blocks {self.target} are one shared module (as in ALBERT); "
                f"a stack edit needs distinct blocks"
            )
        refuse_skipped_blocks(model, self.blocks[0])
        shared = StackState(self.make_runner(), len(self.blocks))
        states = {
            id(module): {"stack": shared, "index": index, "number": int(name.rsplit(".", 1)[-1])}
            for index, (name, module) in enumerate(zip(self.blocks, modules))
        }
        return _MixinHandle(modules, StackMixin, lambda module: states[id(module)])


# -- child edit -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ChildEdit(Edit):
    """Add a module with parameters of its own below a stock one; a stock state dict does not hold them.

    `make` gets the stock module; while planning it must draw no random numbers. A merge or an export would drop the
    module, so they are refused; `trained` says whose it is.
    """

    slot: Slot = Slot.NEW_PARAMETERS
    module: str
    child: str
    make: Callable[[nn.Module], nn.Module]
    trained: str

    @property
    def target(self) -> str:
        return f"{self.module}.{self.child}" if self.module else self.child

    def run(self, model: nn.Module) -> Handle:
        return _ChildHandle(hfmodel.stock_module(model, self.module), self)


class _ChildHandle(Handle):
    def __init__(self, parent: nn.Module, edit: ChildEdit):
        if hasattr(parent, edit.child):
            raise UnsupportedModelError(f"{type(parent).__name__} already has an attribute {edit.child!r}")
        self.parent, self.edit = parent, edit
        parent.add_module(edit.child, edit.make(parent))

    def undo(self, model: nn.Module) -> None:
        self.parent._modules.pop(self.edit.child, None)

    def before_merge(self, model: nn.Module, verb: str) -> None:
        raise StateError(
            f"{verb}(): what {self.edit.trained} has no place in a stock {type(model).__name__}; save() it, and load() "
            f"it on the same base"
        )


# -- claim edit -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ClaimEdit(Edit):
    """Change nothing: say which places are needed as they are, or check a model that has values.

    Attributes:
        named: what stands for it in a plan.
        places: what it claims; none: only itself.
        check: called with the real model, not with one that is planned; raises where the method must be refused.
    """

    named: str
    places: frozenset[Claim] = frozenset()
    check: Callable[[nn.Module], None] | None = None

    @property
    def target(self) -> str:
        return f"({self.named})"

    def claims(self) -> frozenset[Claim]:
        return self.places or super().claims()

    def run(self, model: nn.Module) -> Handle:
        if self.check is not None and not is_planning() and all(hfmodel.has_values(p) for p in model.parameters()):
            self.check(model)
        return Unchanged()


def inner_claims(model: nn.Module, blocks: Iterable[str] = ()) -> frozenset[Claim]:
    """What matters to those who run the blocks with a graph, or without one: their linear layers, and `blocks`."""
    linears = ((Slot.NEW_PARAMETERS, name) for name in hfmodel.block_linears(model))
    return frozenset([*linears, *((Slot.BLOCKS, block) for block in blocks)])


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
        parameters = [model.get_parameter(name) for name in names]
        self.before = [(parameter, parameter.requires_grad) for parameter in parameters]
        for parameter in parameters:
            parameter.requires_grad_(trainable)

    def undo(self, model: nn.Module) -> None:
        for parameter, flag in self.before:
            parameter.requires_grad_(flag)
