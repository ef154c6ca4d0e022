"""Optimizers that would leave untrained, silently, what a recipe trains, or that outlive it: stopped at their step."""

from __future__ import annotations

import warnings
import weakref
from typing import TYPE_CHECKING

import torch
from torch import nn

from tightfit.core.edits import Handle, ParameterHandle
from tightfit.core.errors import StateError, shorten
from tightfit.core.parameter import is_sharded
from tightfit.core.quantised import only_unpacked

if TYPE_CHECKING:
    from tightfit.core.apply import Applied

Flags = dict[str, tuple[nn.Parameter, bool]]
"""The parameters of a stock model by name, and whether each was trained."""


class LeftBehind:
    """Stops an optimizer of a recipe that was taken off, where its parameters went with it."""

    def __init__(self, model: nn.Module, recipe: str, verb: str):
        self.model, self.recipe, self.verb = weakref.ref(model), recipe, verb

    def __call__(self, optimizer, args, kwargs):
        model = self.model()
        if model is None:
            return
        own = {id(parameter) for parameter in model.parameters()}
        for i, group in enumerate(optimizer.param_groups):
            if any(id(parameter) not in own for parameter in group["params"]):
                raise StateError(
                    f"{type(optimizer).__name__}: param group {i} holds parameters of the recipe {self.recipe}, which "
                    f"{self.verb}() took off, so they would train nothing; build a new optimizer over the model"
                )


class StaleCheck:
    """Stops an optimizer whose steps would leave untrained, silently, what the recipe trains.

    It still holds a replaced stock parameter, or was made before what the recipe added, or somebody has frozen that,
    or replaced some of it. Warns where a quantised base trains with nothing added to it, which no one asks for in so
    many words.
    """

    def __init__(self, applied: Applied, handles: list[Handle], flags: Flags, added: list[tuple[str, nn.Parameter]]):
        self.applied = weakref.ref(applied)
        self.replaced = frozenset(id(h.original) for h in handles if isinstance(h, ParameterHandle))
        self.added = added
        self.stock = [p for p, trained in flags.values() if trained and id(p) not in self.replaced]
        self.seen: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self.early: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self.added_trains = False

    def __call__(self, optimizer, args, kwargs):
        applied = self.applied()
        if applied is None:
            return
        if optimizer not in self.seen:
            self._check_added(applied, optimizer)
            self.seen.add(optimizer)
        elif optimizer in self.early and not self.added_trains:  # no other optimizer has stepped with it meanwhile
            raise StateError(
                f"{type(optimizer).__name__}: it was made without the parameters that the recipe {applied.recipe} "
                f"added ({shorten([name for name, _ in self.added], 3)}), so they would not train; build it after "
                f"tightfit.apply(), with applied.optimizer(...)"
            )
        if not self.replaced:
            return
        for i, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                if id(parameter) in self.replaced:
                    raise StateError(
                        f"{type(optimizer).__name__}: param group {i} holds a parameter that the recipe "
                        f"{applied.recipe} replaced, so it would train nothing; build the optimizer with "
                        f"applied.optimizer(...), or hand it over with applied.adopt(optimizer)"
                    )

    def _check_added(self, applied: Applied, optimizer: torch.optim.Optimizer) -> None:
        now = dict(applied.model.named_parameters())
        own = {id(parameter) for parameter in now.values()}
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not held & own:
            return
        if not self.added:
            told = only_unpacked(applied.model)
            if told:
                warnings.warn(f"{type(optimizer).__name__}: {told}", UserWarning, stacklevel=2)
            return
        frozen = [name for name, p in self.added if id(p) in own and not p.requires_grad]
        replaced = [
            name  # sharding puts others in its place too, and these train
            for name, p in self.added
            if id(p) not in own and type(now.get(name)) is nn.Parameter and not is_sharded(now[name])
        ]
        if not replaced and len(frozen) < len(self.added):
            if any(id(p) in held or id(now.get(name)) in held for name, p in self.added):
                self.added_trains = True
            elif self._made_before(held):
                self.early.add(optimizer)
            return
        raise StateError(
            f"{type(optimizer).__name__}: parameters that the recipe {applied.recipe} added ("
            f"{shorten(replaced or frozen, 3)}) have been frozen or replaced since, so they would not train; "
            f"get_peft_model() freezes all but its own adapters: call it before tightfit.apply(), or put "
            f"tightfit.Lora into the recipe, where it goes with the others"
        )

    def _made_before(self, held: set[int]) -> bool:
        """Whether an optimizer of these is one of the stock model: it has one that was frozen since, or all of them."""
        frozen = any(id(p) in held and not p.requires_grad for p in self.stock)
        return frozen or (bool(self.stock) and {id(p) for p in self.stock} <= held)


def added_parameters(model: nn.Module, handles: list[Handle], flags: Flags) -> list[tuple[str, nn.Parameter]]:
    """The parameters that a recipe brought along and that train; stand-ins of stock ones are none of them."""
    known = {id(parameter) for parameter, _ in flags.values()}
    known |= {id(handle.current()) for handle in handles if isinstance(handle, ParameterHandle)}
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad and id(p) not in known]
