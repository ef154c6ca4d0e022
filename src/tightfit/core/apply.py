"""Apply a recipe: resolve every edit on the base model, refuse conflicts, run in slot order, journal, undo."""

from __future__ import annotations

import dataclasses
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tightfit.core import hfmodel
from tightfit.core.conflicts import Conflict, find_conflicts, repeated
from tightfit.core.edit import load_part_tensors, part_tensors
from tightfit.core.edits import Edit, Handle, ParameterHandle, Part
from tightfit.core.errors import ConflictError, RecipeError, StateError, TightfitError, shorten
from tightfit.core.later import made
from tightfit.core.memory import end_left_profiles
from tightfit.core.parameter import gathered, is_sharded
from tightfit.core.quantised import TrainableInEvaluation, packed_for_inference
from tightfit.core.recipe import Recipe, as_recipe
from tightfit.core.stale import Flags, LeftBehind, StaleCheck, added_parameters
from tightfit.core.tight import is_tight
from tightfit.core.transform import Context, Transform

if TYPE_CHECKING:
    from tightfit.core.plan import Plan

PartT = TypeVar("PartT", bound=Part)

_active: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Applied]] = weakref.WeakKeyDictionary()


def resolve(model: nn.Module, recipe: Recipe) -> tuple[list[tuple[Transform, Edit]], list[Conflict]]:
    """The recipe's edits on this model in the order they will run, and the conflicts among them.

    Every selector is resolved on the untouched model. The order is fixed by slot, then method, then place, so
    the order of the recipe cannot matter.

    Raises:
        RecipeError: a transform lacks a field, or has a value that does not fit this model.
    """
    conflicts = repeated(recipe.transforms)
    for transform in recipe:
        missing = transform.unfilled()
        if missing:
            raise RecipeError(f"{type(transform).__name__}: {missing}")
    try:
        context = Context(frozenset(name for t in recipe for name in t.freezes(model)))
        planned = [] if conflicts else [(t, edit) for t in recipe for edit in t.edits(model, context)]
    except TightfitError:
        raise
    except ValueError as error:
        raise RecipeError(str(error)) from error
    for transform, edit in planned:
        assert edit.slot in transform.touches, f"{type(transform).__name__} does not declare slot {edit.slot.label}"
    # within a slot, an edit that owns its place comes before those that make room for it
    planned.sort(key=lambda pair: (pair[1].slot, not pair[1].exclusive, pair[0].name))
    return planned, conflicts + find_conflicts(planned, hfmodel.adapted_layers(model))


def apply(model: nn.Module, recipe: Recipe | Transform | list | tuple | None) -> Applied:
    """Apply a recipe to a model in place, all or nothing.

    Args:
        model: a stock Hugging Face model, before it is wrapped in DDP or FSDP.
        recipe: a recipe, one transform, or a list of them.

    Raises:
        ConflictError: two transforms claim the same place; the model is untouched.
        RecipeError: a method lacks a field, or has a value that does not fit this model; the model is untouched.
        UnsupportedModelError: a method cannot work on this architecture; the model is untouched.
        StateError: the model carries a recipe already, or is wrapped or sharded.

    Example:
        >>> import tightfit
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
        >>> model = BertForSequenceClassification(config)
        >>> with tightfit.apply(model, tightfit.Lora(rank=2)) as applied:
        ...     sum(p.numel() for p in applied.parameters()) < sum(p.numel() for p in model.parameters())
        True
    """
    recipe = as_recipe(recipe)
    end_left_profiles()  # one that a Trainer's step left by raising would go on recording
    _refuse_unready(model)
    planned, conflicts = resolve(model, recipe)
    if conflicts:
        raise ConflictError("; ".join(str(c) for c in conflicts))
    before = _flags(model)
    handles: list[Handle] = [TrainableInEvaluation(model)]
    try:
        for _, edit in planned:
            handles.append(edit.run(model))
    except BaseException:
        for handle in reversed(handles):
            handle.undo(model)
        _restore_flags(model, before)
        raise
    for handle in handles:
        handle.commit(model)
    applied = Applied(model, recipe, planned, handles, before)
    _active[model] = weakref.ref(applied)
    return applied


def _refuse_unready(model: nn.Module) -> None:
    hfmodel.check_module(model, "apply")
    earlier = _active[model]() if model in _active else None
    if earlier is not None:
        raise StateError(
            f"apply(): this {type(model).__name__} already carries the recipe {earlier.recipe}; call its "
            f".remove() or .merge() first, or chain() both recipes into one"
        )
    tight = [name for name, module in model.named_modules() if is_tight(module)]
    if tight:
        raise StateError(
            f"apply(): this {type(model).__name__} is a copy of, or holds, a model with a recipe applied "
            f"(at {shorten(tight, 3)}); start from a stock model"
        )
    packed = packed_for_inference(model)
    if packed:
        raise StateError(
            f"apply(): bitsandbytes has packed layers of this {type(model).__name__} anew for inference on this CPU "
            f"(at {shorten(packed, 3)}), which no gradient passes; load the model again, and apply the recipe before "
            f"the model is first called in evaluation mode"
        )
    reason = hfmodel.refuse_wrapped(model)
    if reason:
        raise StateError(f"apply(): {reason}; apply the recipe before wrapping or sharding the model")


def _flags(model: nn.Module) -> Flags:
    return {name: (parameter, parameter.requires_grad) for name, parameter in model.named_parameters()}


def _restore_flags(model: nn.Module, flags: Flags) -> None:
    now = dict(model.named_parameters())
    for name, (parameter, flag) in flags.items():
        # by name where sharding has replaced the object, by object where an adapter has changed the name
        now.get(name, parameter).requires_grad_(flag)


class Applied:
    """A model with a recipe applied. Also a context manager that removes the recipe on exit.

    Attributes:
        model: the model, the same object that was given to `apply`.
        recipe: what was applied.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        planned: list[tuple[Transform, Edit]],
        handles: list[Handle],
        flags: Flags,
    ):
        self.model = model
        self._recipe = recipe
        self._planned = planned
        self._handles = handles
        self._flags = flags
        self._gone: str | None = None
        self._optimizers: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._added = added_parameters(model, handles, flags)
        hook = register_optimizer_step_pre_hook(StaleCheck(self, handles, flags, self._added))
        self._unhook = weakref.finalize(self, hook.remove)

    # -- looking -----------------------------------------------------------------------------------------------

    @property
    def recipe(self) -> Recipe:
        """The recipe as it stands now: fields that changed since (a grown vocabulary) are brought up to date."""
        changed: dict[int, dict[str, Any]] = {}
        for transform, edit in self._planned:
            if edit.part is not None:
                fields = edit.part.recipe_fields()
                if fields:
                    changed.setdefault(id(transform), {}).update(fields)
        return Recipe(tuple(dataclasses.replace(t, **changed[id(t)]) if id(t) in changed else t for t in self._recipe))

    @property
    def parts(self) -> list[Part]:
        """The living parts of the applied transforms."""
        return list(dict.fromkeys(edit.part for _, edit in self._planned if edit.part is not None))

    def part(self, kind: type[PartT]) -> PartT:
        """The part of the given class; StateError when the recipe has none."""
        for part in self.parts:
            if isinstance(part, kind):
                return part
        raise StateError(f"the recipe {self.recipe} has no {kind.__name__}")

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that train, each once."""
        self._require_live("parameters")
        return (p for p in self.model.parameters() if p.requires_grad)

    def report(self) -> dict[str, Any]:
        """What is applied, as plain data: recipe, trainable and total parameters, edits, facts of each method."""
        self._require_live("report")
        parameters = list(self.model.parameters())
        facts: dict[str, Any] = {}
        for transform, edit in self._planned:
            if edit.part is not None:
                facts.setdefault(type(transform).__name__, {}).update(edit.part.report())
        return {
            "recipe": str(self.recipe),
            "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
            "total_parameters": sum(p.numel() for p in parameters),
            "edits": len(self._planned),
            "methods": facts,
        }

    # -- training ----------------------------------------------------------------------------------------------

    def optimizer(self, cls: type[torch.optim.Optimizer] = torch.optim.AdamW, **kwargs: Any) -> torch.optim.Optimizer:
        """Build an optimizer over the parameters that train; it follows a table that grows later."""
        self._require_live("optimizer")
        trainable = list(self.parameters())
        if not trainable:
            raise StateError(f"optimizer(): the recipe {self.recipe} leaves no parameter to train")
        return self.adopt(cls(trainable, **kwargs))

    def adopt(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Hand over an optimizer: one built before `apply` gets the stand-in parameters and their state rows."""
        self._require_live("adopt")
        for handle in self._handles:
            if isinstance(handle, ParameterHandle):
                handle.adopt(optimizer)
        if optimizer not in self._optimizers:  # the Trainer's callback hands over what is known already
            self._optimizers.add(optimizer)
            for part in self.parts:
                part.optimizer_made(optimizer)
        return optimizer

    def callback(self, plan: Plan | int | None = None):
        """A `transformers.TrainerCallback` for the Trainer.

        What a method needs of the Trainer's events reaches it, and what is logged with the loss gets figures of the
        step: `peak_bytes`, `saved_bytes`, `tokens_per_second`, and `predicted_peak_bytes` where a plan is given.

        The Trainer's checkpoints hold what `state_dict` gives, in `trainer_state.json`; a resumed run takes it back.
        """
        self._require_live("callback")
        from tightfit.core.callback import recipe_callback
        from tightfit.core.reports import StepReports

        predicted: Any = getattr(plan, "peak_bytes", None) or plan
        if predicted is not None and (isinstance(predicted, bool) or not isinstance(predicted, int)):
            raise TypeError(f"callback(plan=...): got {plan!r}, accepted is a Plan or its peak in bytes")
        reports = StepReports(self, predicted)
        return recipe_callback(self, [*(c for part in self.parts if (c := part.callback()) is not None), reports])

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What the methods keep beside the model's own state dict (steps drawn, directions, scores), copied to the CPU.

        For checkpoints of a run that goes on to the same bits: `torch.save` it beside the states of the model and the
        optimizer, or `accelerator.register_for_checkpointing(applied)`. Empty for most recipes. `save` and `load` need
        none of it.

        Example:
            >>> import tightfit
            >>> from transformers import BertConfig, BertForSequenceClassification
            >>> config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
            >>> applied = tightfit.apply(BertForSequenceClassification(config), tightfit.TokenTune(ratio=0.5))
            >>> applied.state_dict()
            {'Tuner/tensors/step': tensor(0)}
            >>> applied.load_state_dict(applied.state_dict())
        """
        self._require_live("state_dict")
        return {
            key: tensor.detach().to("cpu", copy=True)
            for key, tensor in part_tensors(part for part in self.parts if not part.in_model_state).items()
            if tensor.numel()  # nothing was seen yet; it would have another shape than what is read into it
        }

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take back what `state_dict` of the same recipe gave.

        Raises:
            StateError: it is another recipe's.
        """
        self._require_live("load_state_dict")
        parts = [part for part in self.parts if not part.in_model_state]
        names = {type(part).__name__ for part in parts}
        foreign = sorted(key for key in state if key.split("/")[0] not in names)
        if foreign:
            raise StateError(
                f"load_state_dict(): {shorten(foreign, 3)} belong to another recipe; this one is {self.recipe}"
            )
        load_part_tensors(parts, state)

    # -- leaving -----------------------------------------------------------------------------------------------

    def remove(self) -> nn.Module:
        """Take the recipe off: classes, flags, names and objects as they were before `apply`.

        Parameters that the recipe added are dropped. Stock parameters that were trained keep their trained
        values: no second copy of the model is held.
        """
        return self._leave("remove", lambda handle: handle.undo(self.model))

    def merge(self) -> nn.Module:
        """Take the recipe off and leave its result in the stock parameters; returns the stock model."""
        self._before_merge("merge")
        return self._leave("merge", lambda handle: handle.merge(self.model))

    def _leave(self, verb: str, act: Callable[[Handle], None]) -> nn.Module:
        self._require_live(verb)
        for handle in self._handles:
            if isinstance(handle, ParameterHandle) and is_sharded(handle.current()):
                raise StateError(
                    f"{verb}(): {handle.name} has been sharded since (DTensor) and a stand-in cannot be replaced under "
                    f"FSDP; use export() or save() instead"
                )
        while self._handles:
            act(self._handles[-1])
            self._handles.pop()  # what is undone stays undone, so a failed call can be repeated
        _restore_flags(self.model, self._flags)
        self._unhook()
        self._gone = verb
        _active.pop(self.model, None)
        for optimizer in self._optimizers:
            optimizer.register_step_pre_hook(LeftBehind(self.model, f"{self._recipe}", verb))
        return self.model

    def save(self, folder: str | os.PathLike) -> None:
        """Write `recipe.json` and `tightfit.safetensors`: all that is needed to rebuild this on the same base."""
        self._require_live("save")
        from tightfit.core.artifacts import save

        save(self, folder)

    def export(
        self,
        folder: str | os.PathLike,
        *,
        max_shard_size: int | str = "5GB",
        push_to_hub: str | None = None,
        private: bool | None = None,
    ) -> None:
        """Write a stock checkpoint that plain `from_pretrained` loads, with a model card; the model stays as it is.

        Merged weights are made as they are written: beside the model there is never more than a shard. The tokenizer is
        not among it; save yours into the folder afterwards.

        Args:
            max_shard_size: of one file, in bytes or as in "5GB".
            push_to_hub: a repository of the Hugging Face Hub to upload the folder to, as in "user/name".
            private: whether a repository that is made for it is private.

        Raises:
            ArtifactError: the folder is in use or cannot be written, or the Hub refuses it (the folder stays).
            BudgetError: `max_shard_size` is no size.
            StateError, UnsupportedModelError: the recipe's result has no place in a stock model.
        """
        self._require_live("export")
        from tightfit.core.artifacts import export

        export(self, folder, max_shard_size=max_shard_size, push_to_hub=push_to_hub, private=private)

    def stock_state_dict(self, *, later: bool = False) -> dict[str, torch.Tensor]:
        """The state dict with stock names and shapes and everything merged, without changing the model.

        Args:
            later: merged tensors are stand-ins that make their values when they are written.
        """
        self._before_merge("export")
        state = dict(self.model.state_dict())
        for handle in reversed(self._handles):
            handle.stock_state(self.model, state)
        return gathered(state if later else made(state))

    def _before_merge(self, verb: str) -> None:
        self._require_live(verb)
        for handle in self._handles:
            handle.before_merge(self.model, verb)

    def residue(self) -> dict[str, torch.Tensor]:
        """Parts of stock tensors that the stand-ins do not hold."""
        return {name: rest for handle in self._handles for name, rest in handle.residue().items()}

    def __enter__(self) -> Applied:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._gone is None:
            self.remove()

    def _require_live(self, verb: str) -> None:
        if self._gone is not None:
            raise StateError(
                f"{verb}(): this recipe was taken off already ({self._gone}() was called); apply it again to go on"
            )

    def __repr__(self) -> str:
        state = "" if self._gone is None else f", {self._gone}d"
        return f"<Applied {self.recipe} on {type(self.model).__name__}{state}>"
