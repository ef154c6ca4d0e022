"""`simulate`: the step, its levels, and what they add up to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tightfit.core.errors import SimulationError
from tightfit.core.simulate import cuda, timeline
from tightfit.core.simulate.batches import example_batch
from tightfit.core.simulate.extrapolate import extended
from tightfit.core.simulate.hidden import Hidden, measure_hidden
from tightfit.core.simulate.step import Loss, StepOptions, trace_step
from tightfit.core.simulate.timeline import Account, account
from tightfit.core.simulate.tracker import PHASES

EXTRAPOLATE = ("auto", True, False, "unchecked")
_CUDA_NOTES = (
    "cuda is modelled: fused attention and dropout kernels, foreach optimizer, sizes rounded to 512 bytes",
    f"cuBLAS workspace of {cuda.CUBLAS_WORKSPACE_BYTES} bytes is in the peak; the driver's context is not",
)


@dataclasses.dataclass(frozen=True)
class Timeline:
    """Live bytes at the highest moment of every operator, for a plot.

    Attributes:
        phases, modules, operators: where each point belongs.
        categories: category -> bytes per point; stacked they are the level.
        peak: index of the peak.
    """

    phases: list[str]
    modules: list[str]
    operators: list[str]
    categories: dict[str, list[int]]
    peak: int

    @property
    def levels(self) -> list[int]:
        """Live bytes per point."""
        return [sum(parts) for parts in zip(*(v for k, v in self.categories.items() if k != "host"))]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Simulation:
    """What one training step will take. Bytes are what the allocator hands out, not what it reserves.

    Attributes:
        peak_bytes: highest level of the step, weights, optimizer state and batch included.
        by_category: the peak by weights, gradients, optimizer, activations (the batch is counted here), temporary;
            "host" stands beside them: stores in host memory that the allocator does not hold.
        phases: phase -> highest level in it; of forward, backward, recompute, clip, optimizer, zero_grad.
        peak_phase, peak_module, peak_operator: where the peak is.
        saved_bytes: unique storages kept for backward, parameters and buffers left out.
        saved_by_module: the same by the module that made them.
        static_bytes: alive before the step: weights, optimizer state, batch.
        flops, bytes_moved, exponentials, draws, operators: phase -> counts for the time model (elements of exp-like
            functions, random numbers drawn, operators that are no views).
        calls: (phase, operator, element type, shapes of the tensor inputs, shapes of the outputs) -> how often.
        timeline: live bytes over the step.
        slack_bytes: how much more the peak may be because something could not be seen here.
        notes: what was modelled, extrapolated or left out.
    """

    peak_bytes: int
    by_category: dict[str, int]
    phases: dict[str, int]
    peak_phase: str
    peak_module: str
    peak_operator: str
    saved_bytes: int
    saved_by_module: dict[str, int]
    static_bytes: int
    flops: dict[str, int]
    bytes_moved: dict[str, int]
    exponentials: dict[str, int]
    draws: dict[str, int]
    operators: dict[str, int]
    calls: dict[tuple, int]
    timeline: Timeline
    slack_bytes: int = 0
    notes: tuple[str, ...] = ()
    _account: Account | None = dataclasses.field(default=None, repr=False, compare=False)

    @property
    def pass_bytes(self) -> int:
        """Highest level of forward and backward, recomputation included, without the optimizer's part of the step."""
        return max(self.phases.get(phase, 0) for phase in ("forward", "backward", "recompute"))

    def reserved_bytes(self) -> int:
        """What torch's CUDA caching allocator reserves for two such steps, cuBLAS workspace included.

        Replayed through a model of the allocator, never checked against a driver. Of an extended stack the ratio of
        reserved to allocated bytes of the short one is taken.
        """
        account = self._account
        if account is None:
            raise SimulationError(
                "reserved_bytes: this simulation was not made by simulate(), so nothing can be replayed"
            )
        short = max(timeline.levels(account.trace).total)
        highest = max(account.levels.total)
        return round(cuda.replay(account.trace) * highest / short) + cuda.CUBLAS_WORKSPACE_BYTES


def simulate(
    model: nn.Module,
    batch: Mapping[str, Any] | tuple[int, int],
    *,
    optimizer: Any = "adamw",
    clip: float | None = None,
    autocast: torch.dtype | None = None,
    loss: Loss | None = None,
    device: str = "cpu",
    extrapolate: str | bool = "auto",
    train: bool = True,
    accumulate: int = 1,
) -> Simulation:
    """Predict the allocator's peak of one training step, without running it and without weights.

    Args:
        model: real, on `meta`, or transformed; it is copied, never changed.
        batch: a dict of real tensors, or (batch size, length) for a padded example batch. Padding matters: a batch
            without any builds no mask.
        optimizer: one of `OPTIMIZERS`, or a callable from the trainable parameters to an optimizer. Its state
            exists already, as in every step but the first.
        clip: largest gradient norm, or None for no clipping.
        autocast: dtype of a mixed-precision forward.
        loss: from the model's outputs to a scalar; `outputs.loss` by default.
        device: "cpu" is exact; "cuda" is modelled on the CPU.
        extrapolate: "auto" simulates a few blocks where a stack is long and its blocks are alike, and extends them to
            the whole stack, which gives the same bytes; True wherever blocks are alike; False never; "unchecked" as
            "auto" without the third stack that confirms it, for a quick look.
        train: False simulates a forward without gradients in evaluation mode.
        accumulate: micro-batches per step.

    Raises:
        SimulationError: the step needs values or kernels that a simulation does not have, or the batch, the optimizer
            or the device is wrong.
        ValueError: another argument is wrong.

    Example:
        >>> import torch
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> with torch.device("meta"):
        ...     model = BertForSequenceClassification(BertConfig(num_hidden_layers=2))
        >>> simulate(model, (16, 128)).peak_phase
        'backward'
    """
    if extrapolate not in EXTRAPOLATE:
        raise ValueError(f"extrapolate: got {extrapolate!r}, accepted are {', '.join(map(repr, EXTRAPOLATE))}")
    if not isinstance(batch, Mapping):
        batch = example_batch(model, *batch)
    options = StepOptions(
        optimizer=optimizer, clip=clip, autocast=autocast, loss=loss, device=device, train=train, accumulate=accumulate
    )
    found = None
    if extrapolate:
        found = extended(model, batch, options, extrapolate)
    if found is None:
        found = account(*trace_step(model, batch, options))
    return _assemble(found, device)


def _assemble(found: Account, device: str) -> Simulation:
    maxima = timeline.phase_maxima(found.levels, found.phases)
    unseen = Hidden({})
    if device == "cpu":
        ceiling = [maxima.get(phase, 0) for phase in found.phases]
        unseen = measure_hidden(found.signatures, found.levels.total, ceiling)
    if device == "cuda":
        unseen = Hidden(dict.fromkeys(range(len(found.phases)), cuda.CUBLAS_WORKSPACE_BYTES))
    levels = timeline.with_hidden(found.levels, unseen.extra)
    at = timeline.peak(levels)
    counts = found.counts
    return Simulation(
        peak_bytes=levels.total[at],
        by_category=dict(zip(timeline.CATEGORIES, levels.categories[at])),
        phases=_named(timeline.phase_maxima(levels, found.phases)),
        peak_phase=PHASES[found.phases[at]],
        peak_module=found.modules[at],
        peak_operator=found.names[at],
        saved_bytes=sum(found.saved.values()),
        saved_by_module=found.saved,
        static_bytes=levels.static,
        flops=_named(counts.flops),
        bytes_moved=_named(counts.bytes_moved),
        exponentials=_named(counts.exponentials),
        draws=_named(counts.draws),
        operators=_named(counts.operators),
        calls={(PHASES[call[0]], *call[1:]): number for call, number in counts.calls.items()},
        timeline=Timeline(
            [PHASES[p] for p in found.phases],
            found.modules,
            found.names,
            {name: [split[i] for split in levels.categories] for i, name in enumerate(timeline.CATEGORIES)},
            at,
        ),
        slack_bytes=unseen.slack_bytes,
        notes=(*found.notes, *unseen.notes, *(_CUDA_NOTES if device == "cuda" else ())),
        _account=found,
    )


def _named(table: dict[int, int]) -> dict[str, int]:
    return {PHASES[phase]: amount for phase, amount in sorted(table.items())}
