"""What a recipe will cost, before anything is changed."""

from __future__ import annotations

import dataclasses
import inspect
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from tightfit.core import hfmodel
from tightfit.core.apply import Applied, apply, resolve
from tightfit.core.batch import Batch, check_batch, describe_batch
from tightfit.core.conflicts import Conflict
from tightfit.core.edits import planning
from tightfit.core.errors import SimulationError, StateError
from tightfit.core.fields import near
from tightfit.core.quantised import only_unpacked, planned_bytes
from tightfit.core.recipe import Recipe, as_recipe
from tightfit.core.skeleton import meta_copy
from tightfit.core.transform import Transform

if TYPE_CHECKING:
    from tightfit.core.verify import Verification

CATEGORIES = ("weights", "gradients", "optimizer", "activations", "temporary", "host")


@dataclasses.dataclass(frozen=True)
class EditRow:
    """One line of what a recipe would do."""

    method: str
    slot: str
    target: str
    note: str


@dataclasses.dataclass(frozen=True)
class Source:
    """What a plan was made from, so that it can be run; the model is not kept alive."""

    model: Callable[[], nn.Module | None]
    batch: Batch
    optimizer: str | Callable
    options: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a recipe will do to a model and what a training step will take; nothing has been changed.

    Attributes:
        recipe: the recipe.
        model: class name of the model.
        peak_bytes: predicted allocator peak of one training step (measured, where `measured` says so); 0 when the
            recipe has conflicts.
        trainable_parameters, total_parameters: after the recipe.
        by_category: bytes by weights, gradients, optimizer, activations, temporary (all at the peak) and host.
        conflicts: why the recipe would be refused; empty when it can be applied.
        edits: what would change where.
        simulation: the simulated step behind the figures; None when the recipe has conflicts, and where a step was
            measured instead.
        notes: what the reader should know about the figures.
        measured: the figures are those of a real step, because it could not be simulated.
        source: what the plan was made from.
    """

    recipe: Recipe
    model: str
    optimizer: str
    batch: str
    peak_bytes: int
    trainable_parameters: int
    total_parameters: int
    by_category: dict[str, int]
    conflicts: list[Conflict]
    edits: list[EditRow]
    simulation: Any = None
    notes: tuple[str, ...] = ()
    measured: bool = False
    source: Source | None = dataclasses.field(default=None, repr=False, compare=False)

    def verify(self, model: nn.Module | None = None, *, in_place: bool = False) -> Verification:
        """Run one real training step of the planned batch and put what it took beside the prediction.

        Args:
            model: the model with its weights; default: the planned one. Give it where a skeleton was planned.
            in_place: run on the model itself, which is trained by three steps, instead of on a copy. Without it the
                model must fit twice.

        Returns:
            A `Verification`: predicted and measured peak, of the step and of each phase; `str()` is the table.

        Raises:
            StateError: the model has no weights, is gone, or is of another class; or the plan's device is not here.
            ConflictError: the recipe cannot be applied.

        Example:
            >>> import tightfit
            >>> from transformers import BertConfig, BertForSequenceClassification
            >>> small = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
            >>> model = BertForSequenceClassification(small)
            >>> found = tightfit.plan(model, tightfit.Checkpointing(), batch=(4, 32)).verify()
            >>> abs(found.peak_error) < 0.01
            True
        """
        from tightfit.core.verify import verify

        return verify(self, model, in_place=in_place)

    def __str__(self) -> str:
        lines = [f"{self.model}: {self.recipe}", f"batch {self.batch}, optimizer {self.optimizer}", ""]
        if self.conflicts:
            return "\n".join([*lines, "cannot be applied:", *(f"  {c}" for c in self.conflicts)])
        share = 100 * self.trainable_parameters / max(1, self.total_parameters)
        of_all = f"({share:.1f} % of {self.total_parameters:,})"
        lines.append(f"{'trainable parameters':<22}{self.trainable_parameters:>12,}  {of_all}")
        for name in CATEGORIES:
            if self.by_category.get(name):
                lines.append(f"{name:<22}{mib(self.by_category[name]):>12}")
        title = "measured peak" if self.measured else "predicted peak"
        lines.append(f"{title:<22}{mib(self.peak_bytes):>12}")
        counts: dict[tuple[str, str, str], int] = {}
        for row in self.edits:
            key = (row.method, row.slot, row.note)
            counts[key] = counts.get(key, 0) + 1
        lines.append("")
        for (method, slot, note), count in counts.items():
            lines.append(
                f"{method}: {count} edit{'s' if count > 1 else ''} in slot '{slot}'{f' ({note})' if note else ''}"
            )
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return {
            "recipe": self.recipe.to_list(),
            "model": self.model,
            "optimizer": self.optimizer,
            "batch": self.batch,
            "peak_bytes": self.peak_bytes,
            "trainable_parameters": self.trainable_parameters,
            "total_parameters": self.total_parameters,
            "by_category": self.by_category,
            "conflicts": [str(c) for c in self.conflicts],
            "edits": [dataclasses.asdict(row) for row in self.edits],
            "notes": list(self.notes),
            "measured": self.measured,
        }


def mib(count: int) -> str:
    """Bytes as text: MiB below one GiB, GiB above.

    >>> mib(3 * 2**20), mib(5 * 2**30)
    ('3.0 MiB', '5.00 GiB')
    """
    return f"{count / 2**30:.2f} GiB" if abs(count) >= 2**30 else f"{count / 2**20:.1f} MiB"


def plan(
    model: nn.Module,
    recipe: Recipe | Transform | list | tuple | None = None,
    *,
    batch: Batch,
    optimizer: str | Callable = "adamw",
    fallback: str | None = None,
    **options: Any,
) -> Plan:
    """Say what a recipe would do to a model and what it would cost, without touching the model.

    Args:
        model: a real model or a `skeleton`.
        recipe: a recipe, one transform, a list of them, or None for the stock step.
        batch: what the model is called with, as a dict of tensors, or `(batch_size, length)` for a padded batch.
        optimizer: "adamw", "adamw-foreach", "adamw-fused", "sgd", "sgd-momentum", "adafactor", "adamw-8bit", or a
            callable from parameters to an optimizer.
        fallback: "measure" runs real steps on a copy of the model where the step cannot be simulated.
        **options: of the step: `clip` (the largest gradient norm), `autocast` (a dtype), `loss` (from the outputs to a
            scalar; default: their `loss`), `accumulate` (micro-batches), `device` ("cpu", or "cuda", which is
            modelled), `train` (False: a forward in evaluation mode), `extrapolate` (False: simulate every block).

    Raises:
        DataError: a malformed batch, or one that the model cannot be called with.
        SimulationError: the step cannot be simulated; names the operator and the module.
        UnsupportedModelError: a method of the recipe cannot work on this model.
        RecipeError: an incomplete recipe, or a value in it that does not fit this model.
        ValueError, TypeError: something else than a model, or an option that no step can have.

    Example:
        >>> import tightfit
        >>> from transformers import BertConfig
        >>> model = tightfit.skeleton(BertConfig(num_hidden_layers=2), task="sequence-classification")
        >>> stock = tightfit.plan(model, batch=(8, 64))
        >>> lora = tightfit.plan(model, tightfit.Lora(rank=8), batch=(8, 64))
        >>> lora.by_category["optimizer"] < stock.by_category["optimizer"]
        True
    """
    check_options("plan", options)
    if fallback not in (None, "measure"):
        raise ValueError(f"plan(fallback=...): got {fallback!r}, accepted are None and 'measure'")
    draft = Draft(model, as_recipe(recipe))
    try:
        return draft.plan(batch, optimizer, options)
    except SimulationError as error:
        if fallback is None:
            raise
        return draft.measured(batch, optimizer, options, error)


def check_options(verb: str, options: Mapping[str, Any]) -> None:
    """Raise TypeError for what is no option of a simulated step."""
    from tightfit.core.simulate import simulate

    accepted = [name for name in inspect.signature(simulate).parameters if name not in ("model", "batch")]
    for name in options:
        if name not in accepted:
            raise TypeError(
                f"{verb}({name}=...): no such option; accepted are {', '.join(accepted)}{near(name, accepted)}"
            )


class Draft:
    """A recipe applied to a copy of the model without memory; its steps can then be simulated at several batches.

    Attributes:
        conflicts: why the recipe would be refused; nothing can be simulated then.
        gradient_bytes, largest_bytes: all gradients, and the largest of them.
        static_bytes: weights and gradients, which any step holds together; the optimizer's state comes on top.
    """

    def __init__(self, model: nn.Module, recipe: Recipe):
        hfmodel.check_module(model, "plan")
        self.model, self.recipe = model, recipe
        shadow = meta_copy(model)
        planned, self.conflicts = resolve(shadow, recipe)
        self.rows = [EditRow(type(t).__name__, e.slot.label, e.target, e.note) for t, e in planned]
        self.applied: Applied | None = None
        self.trainable = self.total = self.static_bytes = self.gradient_bytes = self.largest_bytes = 0
        if self.conflicts:
            return
        with planning():
            self.applied = apply(shadow, recipe)
        parameters = list(self.applied.model.parameters())
        self.trainable = sum(p.numel() for p in parameters if p.requires_grad)
        self.total = sum(p.numel() for p in parameters)
        self.gradient_bytes = sum(p.nbytes for p in parameters if p.requires_grad)
        self.largest_bytes = max((p.nbytes for p in parameters if p.requires_grad), default=0)
        self.static_bytes = planned_bytes(self.applied.model) + self.gradient_bytes

    def plan(self, batch: Batch, optimizer: str | Callable, options: dict[str, Any]) -> Plan:
        """The plan of a step; see `plan`."""
        from tightfit.core.simulate import simulate

        check_batch(self.model, batch, long_rows=self.recipe.long_rows)
        shared = self._shared(batch, optimizer, options)
        if self.applied is None:
            return Plan(**shared, peak_bytes=0, by_category=dict.fromkeys(CATEGORIES, 0))
        if not self.trainable:
            raise StateError(f"plan: the recipe {self.recipe} leaves no parameter to train")
        found = simulate(self.applied.model, self._inputs(batch), optimizer=optimizer, **options)
        by_category = dict.fromkeys(CATEGORIES, 0) | found.by_category
        by_category["host"] += self._host_bytes()
        told = None if self.applied._added else only_unpacked(self.applied.model)
        notes = (*found.notes, told) if told else found.notes
        return Plan(**shared, peak_bytes=found.peak_bytes, by_category=by_category, simulation=found, notes=notes)

    def measured(self, batch: Batch, optimizer: str | Callable, options: dict[str, Any], reason: Exception) -> Plan:
        """The plan as real steps give it, run on a copy of the model because of `reason`."""
        from tightfit.core.verify import run_step

        if any(p.is_meta for p in self.model.parameters()):
            raise SimulationError(f"{reason} (no step can be measured either: this model has no weights)") from reason
        kept = {key: value for key, value in options.items() if key not in ("extrapolate", "train")}
        found = run_step(self.model, self.recipe, self._inputs(batch), optimizer=optimizer, **kept)
        by_category = {**found.by_category, "host": self._host_bytes()}
        return Plan(
            **self._shared(batch, optimizer, options),
            peak_bytes=found.peak_bytes,
            by_category=by_category,
            notes=(f"measured on a real step, because {reason}",),
            measured=True,
        )

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        return dict(batch) if isinstance(batch, Mapping) else self.recipe.example(self.model, *batch)

    def _host_bytes(self) -> int:
        assert self.applied is not None
        return sum(part.host_bytes() for part in self.applied.parts)

    def _shared(self, batch: Batch, optimizer: str | Callable, options: dict[str, Any]) -> dict[str, Any]:
        return {
            "recipe": self.recipe,
            "model": type(self.model).__name__,
            "optimizer": optimizer if isinstance(optimizer, str) else getattr(optimizer, "__name__", repr(optimizer)),
            "batch": describe_batch(batch),
            "conflicts": self.conflicts,
            "edits": self.rows,
            "trainable_parameters": self.trainable,
            "total_parameters": self.total,
            "source": Source(weakref.ref(self.model), batch, optimizer, options),
        }
