"""What a recipe will cost, before anything is changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tightfit.core.apply import Applied, apply, resolve
from tightfit.core.conflicts import Conflict
from tightfit.core.edits import planning
from tightfit.core.errors import StateError
from tightfit.core.recipe import Recipe, Transform, as_recipe
from tightfit.core.skeleton import meta_copy

CATEGORIES = ("weights", "gradients", "optimizer", "activations", "temporary", "host")


@dataclasses.dataclass(frozen=True)
class EditRow:
    """One line of what a recipe would do."""

    method: str
    slot: str
    target: str
    note: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a recipe will do to a model and what a training step will take; nothing has been changed.

    Attributes:
        recipe: the recipe.
        model: class name of the model.
        peak_bytes: predicted allocator peak of one training step; 0 when the recipe has conflicts.
        trainable_parameters, total_parameters: after the recipe.
        by_category: bytes by weights, gradients, optimizer, activations, temporary (all at the peak) and host.
        conflicts: why the recipe would be refused; empty when it can be applied.
        edits: what would change where.
        simulation: the simulated step behind the figures, None when only static bytes were counted.
        notes: what the reader should know about the figures.
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
        lines.append(f"{'predicted peak':<22}{mib(self.peak_bytes):>12}")
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
    batch: dict[str, torch.Tensor] | tuple[int, int],
    optimizer: str | Callable = "adamw",
    **options: Any,
) -> Plan:
    """Say what a recipe would do to a model and what it would cost, without touching the model.

    Args:
        model: a real model or a `skeleton`.
        recipe: a recipe, one transform, a list of them, or None for the stock step.
        batch: what the model is called with, as a dict of tensors, or `(batch_size, length)` for a padded batch.
        optimizer: one of `tightfit.core.simulate.OPTIMIZERS`, or a callable from parameters to an optimizer.
        **options: further options of `tightfit.core.simulate.simulate`: `clip`, `autocast`, `loss`, `device`, ...

    Raises:
        ValueError: a malformed batch, or an incomplete recipe.
        SimulationError: the step cannot be simulated; names the operator and the module.
        UnsupportedModelError: a method of the recipe cannot work on this model.

    Example:
        >>> import tightfit
        >>> from transformers import BertConfig
        >>> model = tightfit.skeleton(BertConfig(num_hidden_layers=2), task="sequence-classification")
        >>> stock = tightfit.plan(model, batch=(8, 64))
        >>> lora = tightfit.plan(model, tightfit.Lora(rank=8), batch=(8, 64))
        >>> lora.by_category["optimizer"] < stock.by_category["optimizer"]
        True
    """
    recipe = as_recipe(recipe)
    shadow = meta_copy(model)
    planned, conflicts = resolve(shadow, recipe)
    rows = [EditRow(type(t).__name__, e.slot.label, e.target, e.note) for t, e in planned]
    shared: dict[str, Any] = {
        "recipe": recipe,
        "model": type(model).__name__,
        "optimizer": optimizer if isinstance(optimizer, str) else getattr(optimizer, "__name__", repr(optimizer)),
        "batch": describe_batch(batch),
        "conflicts": conflicts,
        "edits": rows,
    }
    if conflicts:
        return Plan(**shared, peak_bytes=0, trainable_parameters=0, total_parameters=0, by_category={})
    with planning():
        applied = apply(shadow, recipe)
    parameters = list(applied.model.parameters())
    counts: dict[str, Any] = {
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "total_parameters": sum(p.numel() for p in parameters),
    }
    return Plan(**shared, **counts, **_costs(applied, batch, optimizer, options))


def _costs(applied: Applied, batch: Any, optimizer: str | Callable, options: dict[str, Any]) -> dict[str, Any]:
    from tightfit.core.simulate import simulate

    if not any(p.requires_grad for p in applied.model.parameters()):
        raise StateError(f"plan: the recipe {applied.recipe} leaves no parameter to train")
    found = simulate(applied.model, batch, optimizer=optimizer, **options)
    by_category = dict.fromkeys(CATEGORIES, 0) | found.by_category
    by_category["host"] += sum(part.host_bytes() for part in applied.parts)
    return {
        "peak_bytes": found.peak_bytes,
        "by_category": by_category,
        "simulation": found,
        "notes": found.notes,
    }


def describe_batch(batch: Any) -> str:
    """A batch in a few words.

    >>> describe_batch((8, 128))
    '8 x 128 (padded)'
    """
    if isinstance(batch, dict):
        return ", ".join(f"{k} {'x'.join(map(str, v.shape))}" for k, v in batch.items() if torch.is_tensor(v))
    try:
        size, length = batch
    except (TypeError, ValueError):
        raise ValueError(f"batch: got {batch!r}, accepted is a dict of tensors or (batch_size, length)") from None
    for name, value in (("batch_size", size), ("length", length)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"batch: {name} is {value!r}, accepted is an int >= 1")
    return f"{size} x {length} (padded)"
