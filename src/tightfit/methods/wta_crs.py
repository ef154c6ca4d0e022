"""WtaCrs: weight gradients from a sample of the rows (arXiv 2305.15265)."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import nn

from tightfit.core import hfmodel
from tightfit.core.edits import CallEdit, Edit, Part
from tightfit.core.errors import SelectorError
from tightfit.core.fields import check_choice, check_float, check_int, check_selector
from tightfit.core.transform import Context, Slot, Transform
from tightfit.methods.operators import estimator_edits, named_linears, padding_edit
from tightfit.methods.operators.modules import TakesIndex
from tightfit.ops.rows import Cached, Rows, Running

log = logging.getLogger(__name__)

AUTO_START = 0.3
AUTO_STEP = 1.25
AUTO_EVERY = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class WtaCrs(Transform):
    """Form each linear layer's weight gradient from a sample of the rows of its input; right in the mean.

    A layer keeps `budget` of the rows of its input, and the product that forms its weight gradient, a third of a full
    step's work, shrinks by as much: it saves time above all. Layers that read the same input share one sample. Under
    `FusedOps` next to nothing more is kept (a number a row): the chosen rows are rebuilt in backward, where the best
    scores, |x| |dy|, are at hand. The forward and the gradients that flow through the layer stay exact.

    Fields:
        budget: fraction of rows kept, or "auto": starts at 0.3 and is raised, layer by layer, where the noise of the
            sampling exceeds `noise` of the gradient's norm.
        mode: "pps" (winners, and the others without replacement) or "wta" (the paper's, with replacement).
        scores: the forward's guess at |dy|. "mask": none, but padding hardly counts; "running": a mean by position;
            "cache": what the example had in the epoch before (needs `examples` and `sample_index` in the batches).
        min_rows: keep at least as many rows.
        noise: for budget="auto".
        examples: number of training examples, for scores="cache".
        where: patterns of the names of linear layers (`|` between them); None: those of the blocks, and the head of a
            language model (not with budget="auto": the chunked loss of `FusedOps` does not watch its noise).

    Raises:
        TypeError, ValueError: a field out of range; `examples` missing for, or given without, scores="cache".
        SelectorError: `where` matches no linear layer (when planned or applied).

    Example:
        >>> import tightfit
        >>> tightfit.chain(tightfit.FusedOps(), tightfit.WtaCrs(budget=0.5))
        chain(FusedOps(), WtaCrs(budget=0.5))

    Source: arXiv 2305.15265, sections 3.2 and 3.3. Deviations: see `tightfit.ops.rows`; attention matrices are not
    sampled, because fused attention has none; by default also the query, key, value, gate and up projections, which
    save time, and the head of a language model; no cache of the gradients' norms unless asked for.
    """

    budget: float | str = 0.3
    mode: str = "pps"
    scores: str = "mask"
    min_rows: int = 16
    noise: float = 0.5
    examples: int | None = None
    where: str | None = None

    name: ClassVar[str] = "wta-crs"
    paper: ClassVar[str] = "2305.15265"
    touches: ClassVar[frozenset[Slot]] = frozenset({Slot.OPERATORS, Slot.INPUTS})
    exact: ClassVar[bool] = False
    reversible: ClassVar[bool] = True
    summary: ClassVar[str] = "weight gradients from a sample of the rows; faster steps"

    def __post_init__(self) -> None:
        if isinstance(self.budget, str):
            check_choice(self, "budget", ("auto",))
        else:
            check_float(self, "budget", low=0, high=1, open_low=True)
        check_choice(self, "mode", ("pps", "wta"))
        check_choice(self, "scores", ("mask", "running", "cache"))
        check_int(self, "min_rows", 1)
        check_float(self, "noise", low=0, open_low=True)
        check_int(self, "examples", 1, optional=True)
        check_selector(self, "where", optional=True)
        if (self.scores == "cache") != (self.examples is not None):
            raise ValueError(
                f"WtaCrs: scores={self.scores!r} with examples={self.examples!r}; scores='cache' needs the number of "
                f"training examples, and the other scores take none"
            )

    @classmethod
    def candidates(cls, model: nn.Module) -> Iterator[WtaCrs]:
        yield cls()

    def edits(self, model: nn.Module, context: Context) -> Iterator[Edit]:
        if self.where is None:
            targets = hfmodel.block_linears(model)
            if targets and not isinstance(self.budget, str):
                targets += hfmodel.lm_head(model)
        else:
            targets = named_linears(model, self.where, method="WtaCrs")
        if not targets:
            raise SelectorError(
                f"WtaCrs: {type(model).__name__} has no blocks with linear layers; name layers by where="
            )
        part = Sampling(self)
        note = f"samples {self.budget} of the rows"
        yield from estimator_edits(model, targets, part.add, method="WtaCrs", part=part, note=note)
        yield from padding_edit(model)
        if self.scores == "cache":
            yield CallEdit(
                where="model",
                mixin=TakesIndex,
                state=lambda model: {"examples": self.examples},
                note="takes sample_index",
            )


class Sampling(Part):
    """The layers' codecs: what they have learnt, and how much they sample."""

    def __init__(self, transform: WtaCrs):
        self.transform = transform
        self.codecs: dict[str, Rows] = {}
        self.steps = 0

    def add(self, name: str, module: nn.Module) -> dict[str, Any]:
        """The state of one more layer."""
        t = self.transform
        scores: Any = None
        if t.scores == "running":
            scores = Running()
        elif t.examples is not None:
            scores = Cached(t.examples)
        budget = AUTO_START if isinstance(t.budget, str) else t.budget
        codec = Rows(budget, t.mode, t.min_rows, scores, watch=isinstance(t.budget, str))
        self.codecs[name] = codec
        return {"codec": codec}

    def noises(self) -> list[float]:
        """Per layer: the standard deviation of the sampled gradient as a share of its norm; nan where not known."""
        found = (codec.noise for codec in self.codecs.values())
        return [float("nan") if n is None else float((n[0] / n[1].clamp_min(1e-30)).sqrt()) for n in found]

    def report(self) -> dict[str, Any]:
        budgets = [codec.budget for codec in self.codecs.values()]
        facts: dict[str, Any] = {"layers": len(budgets), "budget": (min(budgets), max(budgets)) if budgets else None}
        known = [n for n in self.noises() if n == n]
        if known:
            facts["noise"] = (min(known), max(known))
        return facts

    def tensors(self) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for name, codec in self.codecs.items():
            if codec.scores is not None:
                found |= {f"{name}/{key}": value for key, value in codec.scores.tensors().items()}
            if codec.watch:  # the same names before anything was seen
                found[f"{name}/noise"] = torch.empty(0) if codec.noise is None else codec.noise
                found[f"{name}/budget"] = torch.tensor(codec.budget, dtype=torch.float64)
        return found

    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, codec in self.codecs.items():
            prefix = f"{name}/"
            own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            if codec.scores is not None:
                codec.scores.load(own)
            if codec.watch and "budget" in own:
                noise = own.get("noise")
                codec.noise = noise if noise is not None and noise.numel() else None
                codec.budget = own["budget"].item()

    def training_tensors(self) -> dict[str, torch.Tensor]:
        return {"steps": torch.tensor(self.steps)} if isinstance(self.transform.budget, str) else {}

    def load_training_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        self.steps = int(tensors["steps"])

    def host_bytes(self) -> int:
        caches = (codec.scores for codec in self.codecs.values() if isinstance(codec.scores, Cached))
        return sum(0 if cache.lengths is None else cache.lengths.nbytes for cache in caches)

    def optimizer_made(self, optimizer: torch.optim.Optimizer) -> None:
        if isinstance(self.transform.budget, str):
            optimizer.register_step_post_hook(lambda *_: self.after_step())

    def after_step(self) -> None:
        """Every few steps: raise the budget of layers that are too noisy, lower it again where they are quiet."""
        self.steps += 1
        if self.steps % AUTO_EVERY:
            return
        limit = self.transform.noise
        for (name, codec), noise in zip(self.codecs.items(), self.noises()):
            before = codec.budget
            if noise > limit:
                codec.budget = min(1.0, before * AUTO_STEP)
            elif noise < limit / 2:
                codec.budget = max(AUTO_START, before / AUTO_STEP)
            if codec.budget != before:
                message = "WtaCrs: %s samples %.2f of the rows, before %.2f (noise %.2f of the gradient)"
                log.info(message, name, codec.budget, before, noise)
