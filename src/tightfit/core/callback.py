"""The Trainer side of an applied recipe."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from tightfit.core import weights
from tightfit.core.errors import StateError

if TYPE_CHECKING:
    from tightfit.core.apply import Applied

EVENTS = [name for name in vars(TrainerCallback) if name.startswith("on_")]


class RecipeCallback(TrainerCallback, ExportableState):
    """Hands the Trainer's events to the parts of a recipe, and its optimizer to the recipe.

    What the parts keep goes into the Trainer's checkpoints as its `state`. Trained weights that the Trainer itself does
    not write, or writes under names that it does not read again, go into a file beside its own.
    """

    applied: Applied
    callbacks: list[TrainerCallback]

    def __init__(self) -> None:
        self.step = 0

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        self._check_model(kwargs.get("model"))
        # the Trainer passes accelerate's wrapper; the recipe needs the optimizer whose groups it may edit
        inner = getattr(optimizer, "optimizer", optimizer)
        if inner is not None:
            self.applied.adopt(inner)
        self._resume(args, state)
        return self._pass_on("on_train_begin", args, state, control, optimizer=optimizer, **kwargs)

    def on_save(self, args, state, control, **kwargs):
        if getattr(args, "should_save", False):
            weights.add_missing(self.applied, Path(args.output_dir) / f"checkpoint-{state.global_step}")
        return self._pass_on("on_save", args, state, control, **kwargs)

    def on_train_end(self, args, state, control, **kwargs):
        best = getattr(state, "best_model_checkpoint", None)
        if best is not None and args.load_best_model_at_end:
            weights.read_missing(self.applied, Path(best))
        return self._pass_on("on_train_end", args, state, control, **kwargs)

    def on_step_end(self, args, state, control, **kwargs):
        self.step = getattr(state, "global_step", 0)
        return self._pass_on("on_step_end", args, state, control, **kwargs)

    def state(self) -> dict[str, Any]:
        """What the Trainer writes into `trainer_state.json`; the class itself knows what the callback is made of."""
        saved = {
            "step": self.step,
            "tensors": _as_text(self.applied.state_dict()),
            "trained": weights.digests(self.applied) if self.step else {},
        }
        return {"args": {}, "attributes": {"saved": saved}}

    def _check_model(self, model: Any) -> None:
        if model is not None and not any(module is self.applied.model for module in model.modules()):
            raise StateError(
                f"callback(): the Trainer trains another {type(model).__name__} than the one that the recipe "
                f"{self.applied.recipe} was applied to (model_init makes a new one for each run); give it "
                f"model=applied.model and that one's callback"
            )

    def _resume(self, args: Any, state: Any) -> None:
        self.step = getattr(state, "global_step", 0)
        held = getattr(state, "stateful_callbacks", None)
        # the Trainer saves only into a place that is there, and a run that began without a recipe has left none
        found = None if held is None else held.setdefault(RecipeCallback.__name__, {})
        saved = found.get("attributes", {}).get("saved") if isinstance(found, dict) else None
        # a run that begins holds the state of its own beginning; one of another step says nothing
        if self.step and saved and saved["step"] == self.step:
            self.applied.load_state_dict(_from_text(saved["tensors"]))
            folders = (args.resume_from_checkpoint, f"{args.output_dir}/checkpoint-{self.step}")
            weights.check(self.applied, saved["trained"], [Path(f) for f in folders if isinstance(f, str)])

    def _pass_on(self, event: str, args, state, control, **kwargs) -> Any:
        for callback in self.callbacks:
            control = getattr(callback, event)(args, state, control, **kwargs) or control
        return control


def recipe_callback(applied: Applied, callbacks: list[TrainerCallback]) -> RecipeCallback:
    """The callback of an applied recipe: of a class of its own, as the Trainer may make it anew from its class."""
    return type(RecipeCallback.__name__, (RecipeCallback,), {"applied": applied, "callbacks": callbacks})()


def _as_text(tensors: dict[str, torch.Tensor]) -> str:
    from safetensors.torch import save

    return base64.b64encode(save({key: t.contiguous() for key, t in tensors.items()})).decode() if tensors else ""


def _from_text(text: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    return load(base64.b64decode(text)) if text else {}


def _forwarder(event: str):
    def forward(self, args, state, control, **kwargs):
        return self._pass_on(event, args, state, control, **kwargs)

    forward.__name__ = event
    return forward


for _event in EVENTS:
    if _event not in vars(RecipeCallback):
        setattr(RecipeCallback, _event, _forwarder(_event))
