"""A plan beside one real step."""

from __future__ import annotations

import copy
import dataclasses
import gc
from collections.abc import Callable

import torch
from torch import nn

from tightfit.core.apply import apply
from tightfit.core.errors import StateError
from tightfit.core.memory import Measurement, live_bytes, measure
from tightfit.core.plan import Plan, mib, plan
from tightfit.core.recipe import Recipe, Transform, as_recipe


@dataclasses.dataclass(frozen=True)
class Verification:
    """What was predicted beside what was measured.

    Attributes:
        plan: the prediction.
        peak_bytes, saved_bytes: measured; the peak counts the model, its optimizer and the batch, nothing else that
            lives in this process.
        measurement: the measurement as it was, everything alive in this process included.
    """

    plan: Plan
    peak_bytes: int
    saved_bytes: int
    measurement: Measurement

    @property
    def peak_error(self) -> float:
        """Predicted over measured peak, less 1."""
        return self.plan.peak_bytes / self.peak_bytes - 1

    def __str__(self) -> str:
        rows = [
            ("peak", self.plan.peak_bytes, self.peak_bytes),
            ("saved for backward", self.plan.simulation.saved_bytes, self.saved_bytes),
        ]
        lines = [
            f"{self.plan.model}: {self.plan.recipe}",
            f"batch {self.plan.batch}, optimizer {self.plan.optimizer}",
            "",
            f"{'':<20}{'predicted':>14}{'measured':>14}{'difference':>14}",
        ]
        for name, predicted, measured in rows:
            off = f"{100 * (predicted / measured - 1):+.3f} %" if measured else "-"
            lines.append(f"{name:<20}{mib(predicted):>14}{mib(measured):>14}{off:>14}")
        return "\n".join(lines)


def verify(
    model: nn.Module,
    recipe: Recipe | Transform | list | tuple | None,
    *,
    batch: dict[str, torch.Tensor] | tuple[int, int],
    optimizer: str | Callable = "adamw",
    clip: float | None = None,
) -> Verification:
    """Run one real training step on a copy of the model and put the prediction beside it.

    Args:
        model: a model with weights; it is copied, so it must fit twice, and is not changed.
        recipe: what to apply to the copy.
        batch: a dict of tensors, best the longest sample of the data, or (batch size, length).
        optimizer: as for `plan`.
        clip: largest gradient norm, or None.

    Raises:
        StateError: the model has no weights (a skeleton).
        ConflictError: the recipe cannot be applied.

    Example:
        >>> import tightfit
        >>> from tightfit.core.verify import verify
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> small = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        >>> found = verify(BertForSequenceClassification(small), tightfit.Checkpointing(), batch=(4, 32))
        >>> abs(found.peak_error) < 0.01
        True
    """
    from tightfit.core.simulate import example_batch
    from tightfit.core.simulate.optimizers import make_optimizer

    recipe = as_recipe(recipe)
    if any(p.is_meta for p in model.parameters()):
        raise StateError("verify: this model has no weights (a skeleton); load it before running a step")
    if isinstance(batch, tuple):
        batch = example_batch(model, *batch)
    predicted = plan(model, recipe, batch=batch, optimizer=optimizer, clip=clip)
    device = next(model.parameters()).device
    gc.collect()
    others = live_bytes(device.type)
    twin = copy.deepcopy(model).train()
    applied = apply(twin, recipe)
    inputs = {key: value.to(device, copy=True) if torch.is_tensor(value) else value for key, value in batch.items()}
    stepper = applied.adopt(make_optimizer(optimizer, applied.parameters(), device.type))

    def step() -> None:
        twin(**inputs).loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(applied.parameters(), clip)
        stepper.step()
        stepper.zero_grad()

    found = measure(step, warmup=1, repeats=0)
    return Verification(predicted, found.peak_bytes - others, found.saved_bytes, found)
