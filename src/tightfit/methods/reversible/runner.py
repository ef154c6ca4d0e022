"""The runner of a reversible stack, and what its stacks share: the numbers, the halves, how far training is."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tightfit.core.edits import Part, StackRunner
from tightfit.core.recording import noted_kinds
from tightfit.core.stack import block_of
from tightfit.methods.reversible import replay
from tightfit.methods.reversible.guard import check_span
from tightfit.methods.reversible.names import LAGGED, MERGE
from tightfit.methods.reversible.seam import Seam, cut_of
from tightfit.methods.reversible.streams import Fixed, Floating, Half
from tightfit.methods.reversible.tape import Tape
from tightfit.methods.reversible.tiles import Tiled, tile_count
from tightfit.ops.replay import drops

LARGEST_K = 12
BITS = 20


@dataclasses.dataclass
class Plan:
    """What the stacks of one applied recipe do.

    Attributes:
        halves: the half steps of a block.
        exact: integer streams.
        bits: of them, behind the point.
        merge: rule for the streams at the end.
        anchors: every how many blocks the streams are kept; 0: never.
        kept: names of the blocks that keep the streams because they cannot be repeated bit by bit.
        post_norm, allow_inexact: for the guard of floating point.
        anneal: last share of the training in which the factor goes to 0.
        tiles: into how many parts the tokens go behind a block's attention, at most.
        progress: share of the training that is over.
    """

    halves: tuple[Half, ...]
    exact: bool
    merge: str
    anchors: int
    post_norm: bool
    allow_inexact: bool
    anneal: float
    debug: bool
    tiles: int = 1
    bits: int = BITS
    kept: frozenset[str] = frozenset()
    progress: float = 0.0

    @property
    def blocks_alike(self) -> bool:
        """Whether every block of the span is run like its neighbours; the planner asks."""
        return not self.anchors and not self.kept

    def now(self) -> tuple[Half, ...] | None:
        """The half steps at this point of the training; None: the blocks are plain ones now."""
        start = 1 - self.anneal
        if not self.anneal or self.progress < start:
            return self.halves
        (half,) = self.halves
        levels = LARGEST_K - half.shift + 1
        level = half.shift + 1 + int((self.progress - start) / self.anneal * levels)
        return (dataclasses.replace(half, factor=2.0**-level),) if level <= LARGEST_K else None

    @property
    def annealing(self) -> bool:
        """Whether the factor is smaller than it was."""
        return self.now() != self.halves


class Coupling(Part):
    """The living side of `Reversible`: tell it how far training is where no Trainer does.

    `applied.part(Coupling).set_progress(step / steps)` before every step lets the factor of `anneal` go to 0.
    """

    def __init__(self, plan: Plan, blocks: int):
        self.plan, self.blocks = plan, blocks

    def set_progress(self, progress: float) -> None:
        """Share of the training that is over, in [0, 1].

        Raises:
            ValueError: it is outside of that.
        """
        if not 0 <= progress <= 1:
            raise ValueError(f"Coupling.set_progress: got {progress}, accepted is a share in [0, 1]")
        self.plan.progress = progress

    def report(self) -> dict[str, Any]:
        halves = self.plan.now()
        facts: dict[str, Any] = {"blocks": self.blocks, "kept_blocks": sorted(self.plan.kept)}
        facts["factors"] = [half.factor for half in halves] if halves is not None else [0.0]
        if self.plan.exact:
            facts["bits_behind_the_point"] = self.plan.bits
            facts["bits_kept_per_element_and_block"] = sum(half.shift for half in halves or ())
        return facts

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"bits": torch.tensor(self.plan.bits), "progress": torch.tensor(self.plan.progress, dtype=torch.float64)}

    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        self.plan.bits, self.plan.progress = int(tensors["bits"]), float(tensors["progress"])

    def callback(self):
        if not self.plan.anneal:
            return None
        from transformers import TrainerCallback

        part = self

        class Progress(TrainerCallback):
            """Tells the coupling how far the Trainer is."""

            def on_step_begin(self, args, state, control, **kwargs):
                part.set_progress(min(1.0, state.global_step / max(1, state.max_steps)))

            def on_train_end(self, args, state, control, **kwargs):
                part.set_progress(min(1.0, state.global_step / max(1, state.max_steps)))

        return Progress()


class Runner(StackRunner):
    """Runs the blocks of one stack, or of a span of one, as half steps of two streams."""

    def __init__(self, plan: Plan, names: tuple[str, ...]):
        self.plan, self.names = plan, names

    def __deepcopy__(self, memo):
        # copies of a model share one plan among their stacks, but not with the model
        return Runner(copy.deepcopy(self.plan, memo), self.names)

    def open(self, hidden: Any) -> Tape | None:
        plan = self.plan
        halves = plan.now()
        if halves is None:
            return None
        numbers = Fixed(plan.bits) if plan.exact else Floating()
        if not plan.exact and torch.is_grad_enabled() and not plan.annealing:
            check_span(plan.halves, plan.post_norm, plan.anchors or len(self.names), hidden, plan.allow_inexact)
        return Tape(numbers, halves, hidden, plan.debug)

    def block(self, tape: Tape | None, index: int, last: bool, forward, hidden, args: tuple, kwargs: dict) -> Any:
        if tape is None:
            if not torch.is_grad_enabled():
                return forward(hidden, *args, **kwargs)
            return checkpoint(forward, hidden, *args, use_reentrant=False, **kwargs)
        block, name = block_of(forward), self.names[index]
        # the last one of "meft1" has no adapter on the lagging stream where nobody would read that
        halves = tuple(half for half in tape.halves if half.part != "lagged" or LAGGED in block._modules)
        tape.enter(hidden, name)
        draws = torch.is_grad_enabled() and drops(block)
        keep = name in self.plan.kept or (not self.plan.exact and self._is_anchor(index))
        rest = None
        for number, half in enumerate(halves):
            part = _part(half, block, forward, args, kwargs, self.plan.tiles, hidden)
            final = last and number == len(halves) - 1
            found = tape.run(half, part, name, draws=draws, last=final, keep=keep and number == 0)
            rest = found if found is not None else rest
        out = tape.leave()
        if last:
            out = self._merged(tape, block)
            tape.close()
        return out if rest is None else (out, *rest)

    def _is_anchor(self, index: int) -> bool:
        plan = self.plan
        return plan.annealing or bool(index and plan.anchors and index % plan.anchors == 0)

    def _merged(self, tape: Tape, block: nn.Module) -> torch.Tensor:
        lag, state = tape.edges
        if self.plan.merge == "mean":
            return (lag + state) / 2
        if self.plan.merge == "weighted":
            return state + 0.1 * lag
        if self.plan.merge == "concat":
            merge: Any = getattr(block, MERGE)  # in float32 where the model is in half precision
            return merge(torch.cat([lag, state], dim=-1).to(merge.weight.dtype)).to(state.dtype)
        return state


def _part(
    half: Half, block: nn.Module, forward, args: tuple, kwargs: dict, tiles: int, hidden: torch.Tensor
) -> replay.Part:
    if half.part == "lagged":
        adapter: Any = getattr(block, LAGGED)
        return replay.Part(adapter, adapter, parameters=_trained(adapter))
    if half.part in ("attention", "mlp"):
        turn, seam = (1 if half.part == "attention" else 2), cast(Seam, cut_of(block))

        def function(x, *args, **kwargs):
            out = seam.run(turn, forward, x, args, kwargs)
            lagged: Any = block._modules.get(LAGGED)
            return out + lagged(out) if turn == 1 and lagged is not None else out

        return replay.Part(function, block, args, kwargs, parameters=_trained(block))
    apart = {id(p) for name in (LAGGED, MERGE) if name in block._modules for p in getattr(block, name).parameters()}
    own = [p for p in _trained(block) if id(p) not in apart]
    count = tile_count(tiles, block, hidden, own, kwargs)
    if count > 1 and not noted_kinds():
        return Tiled(cast(Seam, cut_of(block)), count, forward, block, args, kwargs, own)
    return replay.Part(forward, block, args, kwargs, parameters=own)


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]
