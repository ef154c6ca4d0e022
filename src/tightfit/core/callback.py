"""The Trainer side of an applied recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

if TYPE_CHECKING:
    from tightfit.core.apply import Applied

EVENTS = [name for name in vars(TrainerCallback) if name.startswith("on_")]


class RecipeCallback(TrainerCallback):
    """Hands the Trainer's events to the parts of a recipe, and its optimizer to the recipe."""

    def __init__(self, applied: Applied, callbacks: list[TrainerCallback]):
        self._applied = applied
        self._callbacks = callbacks

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        # the Trainer passes accelerate's wrapper; the recipe needs the optimizer whose groups it may edit
        inner = getattr(optimizer, "optimizer", optimizer)
        if inner is not None:
            self._applied.adopt(inner)
        return self._pass_on("on_train_begin", args, state, control, optimizer=optimizer, **kwargs)

    def _pass_on(self, event: str, args, state, control, **kwargs) -> Any:
        for callback in self._callbacks:
            control = getattr(callback, event)(args, state, control, **kwargs) or control
        return control


def _forwarder(event: str):
    def forward(self, args, state, control, **kwargs):
        return self._pass_on(event, args, state, control, **kwargs)

    forward.__name__ = event
    return forward


for _event in EVENTS:
    if _event != "on_train_begin":
        setattr(RecipeCallback, _event, _forwarder(_event))
