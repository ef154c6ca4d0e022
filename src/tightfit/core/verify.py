"""One real training step, phase by phase, beside what was predicted for it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tightfit.core import hfmodel
from tightfit.core.apply import apply
from tightfit.core.errors import ConflictError, StateError
from tightfit.core.memory import allocation_profile, live_bytes, saved_bytes
from tightfit.core.quantised import state_bytes
from tightfit.core.recipe import Recipe

if TYPE_CHECKING:
    from tightfit.core.apply import Applied
    from tightfit.core.plan import Plan

PHASES = ("forward", "backward", "clip", "optimizer", "zero_grad")
_PREFIX = "tightfit-phase:"

Phase = Callable[[str], contextlib.AbstractContextManager[Any]]


@dataclasses.dataclass(frozen=True)
class RealStep:
    """What one warm training step took on this machine.

    Attributes:
        peak_bytes: highest allocator level; counts the model, its optimizer and the batch, nothing else that lives in
            this process.
        saved_bytes: unique storages kept for backward, parameters and buffers left out.
        phases: forward, backward, clip, optimizer, zero_grad -> highest level in it; recomputation is in backward.
        levels: phase -> level after every allocation and release; on a GPU the highest one only.
        by_category: weights, gradients, optimizer, activations (saved_bytes), temporary (the rest of the peak), host.
    """

    peak_bytes: int
    saved_bytes: int
    phases: dict[str, int]
    levels: dict[str, list[int]]
    by_category: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Verification:
    """A plan beside one real step of it; made by `Plan.verify`.

    Attributes:
        plan: the prediction.
        measured: the step as it was measured.
    """

    plan: Plan
    measured: RealStep

    @property
    def peak_bytes(self) -> int:
        """Measured allocator peak."""
        return self.measured.peak_bytes

    @property
    def saved_bytes(self) -> int:
        """Measured bytes kept for backward."""
        return self.measured.saved_bytes

    @property
    def levels(self) -> dict[str, list[int]]:
        """Phase -> measured levels, for a plot."""
        return self.measured.levels

    @property
    def peak_error(self) -> float:
        """Predicted over measured peak, less 1."""
        return self.plan.peak_bytes / self.peak_bytes - 1

    def rows(self) -> list[tuple[str, int, int]]:
        """(name, predicted, measured) of the peak, of every phase and of what is kept for backward."""
        found = [("peak", self.plan.peak_bytes, self.peak_bytes)]
        predicted = dict(self.plan.simulation.phases)
        predicted["backward"] = max(predicted.get("backward", 0), predicted.pop("recompute", 0))
        for name in PHASES:
            if name in predicted and name in self.measured.phases:
                found.append((name.replace("_", " "), predicted[name], self.measured.phases[name]))
        return [*found, ("saved for backward", self.plan.simulation.saved_bytes, self.saved_bytes)]

    def __str__(self) -> str:
        from tightfit.core.plan import mib

        lines = [
            f"{self.plan.model}: {self.plan.recipe}",
            f"batch {self.plan.batch}, optimizer {self.plan.optimizer}",
            "",
            f"{'':<20}{'predicted':>14}{'measured':>14}{'difference':>14}",
        ]
        for name, predicted, measured in self.rows():
            off = f"{100 * (predicted / measured - 1):+.3f} %" if measured else "-"
            lines.append(f"{name:<20}{mib(predicted):>14}{mib(measured):>14}{off:>14}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The comparison as JSON values."""
        return {
            "peak_bytes": self.peak_bytes,
            "saved_bytes": self.saved_bytes,
            "peak_error": self.peak_error,
            "phases": self.measured.phases,
        }


def run_step(
    model: nn.Module,
    recipe: Recipe,
    batch: dict[str, torch.Tensor],
    *,
    optimizer: str | Callable = "adamw",
    clip: float | None = None,
    autocast: torch.dtype | None = None,
    loss: Callable | None = None,
    accumulate: int = 1,
    device: str = "cpu",
    in_place: bool = False,
) -> RealStep:
    """Run real training steps under a recipe and account for the memory of one of them.

    A first step makes the optimizer's state, a second one is measured, a third one counted for what it saves. The
    random state is afterwards what it was before.

    Args:
        model: with weights.
        recipe: what to apply.
        batch: what the model is called with.
        optimizer, clip, autocast, loss, accumulate: as for `plan`.
        device: "cpu" or "cuda"; where the step runs.
        in_place: use the model itself, which is trained by it, instead of a copy.

    Raises:
        StateError: the model has no weights (a skeleton), or this machine has no such device.
        ConflictError: the recipe cannot be applied.

    Example:
        >>> import torch
        >>> from tightfit import Lora, chain
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> small = BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
        >>> batch = {"input_ids": torch.ones(2, 8, dtype=torch.long), "labels": torch.zeros(2, dtype=torch.long)}
        >>> found = run_step(BertForSequenceClassification(small), chain(Lora(rank=2)), batch)
        >>> found.peak_bytes == max(found.phases.values())
        True
    """
    from tightfit.core.simulate.step import loss_of

    if any(p.is_meta for p in model.parameters()):
        raise StateError("verify: this model has no weights (a skeleton); load it before running a step")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise StateError("verify: the plan is for a GPU and this machine has none; plan with device='cpu', or go there")
    kind = torch.device(device).type
    with contextlib.ExitStack() as stack:
        # a run that comes after draws the same numbers as without this one
        stack.enter_context(torch.random.fork_rng(devices=[torch.cuda.current_device()] if kind == "cuda" else []))
        gc.collect()
        others = live_bytes(kind) - (_own_bytes(model, kind) if in_place else 0)
        twin = model if in_place else copy.deepcopy(model)
        applied = apply(twin.to(device).train(), recipe)
        if in_place:
            stack.callback(applied.remove)
        inputs = {k: v.to(device, copy=True) if torch.is_tensor(v) else v for k, v in batch.items()}

        def step(phase: Phase = lambda name: contextlib.nullcontext()) -> None:
            for _ in range(accumulate):
                with phase("forward"), torch.autocast(kind, dtype=autocast, enabled=autocast is not None):
                    outputs = twin(**inputs)
                    found = loss_of(outputs, loss)
                    del outputs
                with phase("backward"):
                    found.backward()
                    del found
            if clip is not None:
                with phase("clip"):
                    nn.utils.clip_grad_norm_(applied.parameters(), clip)
            with phase("optimizer"):
                stepper.step()
            with phase("zero_grad"):
                stepper.zero_grad()

        stepper = applied.adopt(_optimizer(optimizer, applied, kind))
        step()
        gc.collect()
        levels = _levels_cuda(step) if kind == "cuda" else _levels_cpu(step)
        kept = saved_bytes(step)
        state = [t for s in stepper.state.values() for t in s.values() if torch.is_tensor(t)]
        trained = [p for p in applied.parameters() if p.requires_grad]
        weights = _own_bytes(twin, kind)
    levels = {name: [level - others for level in values] for name, values in levels.items()}
    phases = {name: max(values) for name, values in levels.items()}
    by_category = {
        "weights": weights,
        "gradients": sum(p.nbytes for p in trained),
        "optimizer": hfmodel.unique_storage_bytes(t for t in state if t.device.type == kind),
        "activations": kept,
    }
    peak = max(phases.values())
    by_category["temporary"] = max(0, peak - sum(by_category.values()))
    return RealStep(peak, kept, phases, levels, by_category | {"host": 0})


def _optimizer(choice: str | Callable, applied: Applied, kind: str) -> torch.optim.Optimizer:
    from tightfit.core.simulate.eight_bit import adamw_8bit, embedding_tables
    from tightfit.core.simulate.optimizers import make_optimizer

    if choice != "adamw-8bit":
        return make_optimizer(choice, applied.parameters(), kind)
    try:
        return adamw_8bit()(applied.parameters(), tables=embedding_tables(applied.model), lr=1e-4)
    except ImportError:
        raise StateError("verify: a step of 'adamw-8bit' needs bitsandbytes: pip install bitsandbytes") from None


def _own_bytes(model: nn.Module, kind: str) -> int:
    tensors = (*model.parameters(), *model.buffers())
    return hfmodel.unique_storage_bytes(t for t in tensors if t.device.type == kind) + state_bytes(model)


def _levels_cpu(step: Callable[[Phase], None]) -> dict[str, list[int]]:
    """Phase -> allocator level after each of its events, the level at its start first."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        level = live_bytes()
        with allocation_profile() as run:
            step(lambda name: torch.profiler.record_function(_PREFIX + name))
    finally:
        if collecting:
            gc.enable()
    events = run.profiler.kineto_results.events()
    starts = sorted((e.start_ns(), e.name().removeprefix(_PREFIX)) for e in events if e.name().startswith(_PREFIX))
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    found: dict[str, list[int]] = {}
    at = 0
    for number, (_, name) in enumerate(starts):
        end = starts[number + 1][0] if number + 1 < len(starts) else None
        values = found.setdefault(name, [])
        values.append(level)
        while at < len(changes) and (end is None or changes[at][0] < end):
            level += changes[at][1]
            values.append(level)
            at += 1
    return found


def _levels_cuda(step: Callable[[Phase], None]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}

    @contextlib.contextmanager
    def phase(name: str) -> Iterator[None]:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        yield
        torch.cuda.synchronize()
        found.setdefault(name, []).append(torch.cuda.max_memory_allocated())

    step(phase)
    return found


def verify(found: Plan, model: nn.Module | None = None, *, in_place: bool = False) -> Verification:
    """Run what a plan predicts; see `Plan.verify`."""
    if found.conflicts:
        raise ConflictError("; ".join(str(conflict) for conflict in found.conflicts))
    source = found.source
    if source is None or found.simulation is None:
        raise StateError("verify: this plan holds no simulated step; make it with tightfit.plan(model, ...)")
    model = model if model is not None else source.model()
    if model is None:
        raise StateError("verify: the planned model is gone; give it, as in plan.verify(model)")
    if type(model).__name__ != found.model:
        raise StateError(f"verify: the plan is for a {found.model}, the given model is a {type(model).__name__}")
    batch: Any = source.batch
    if not isinstance(batch, Mapping):
        batch = found.recipe.example(model, *batch)
    options = {key: value for key, value in source.options.items() if key not in ("extrapolate", "train")}
    step = run_step(model, found.recipe, batch, optimizer=source.optimizer, in_place=in_place, **options)
    return Verification(found, step)
