"""Reversible: blocks whose inputs are had back from their outputs, bit by bit (after MEFT, arXiv 2306.00477)."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import warnings
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import nn

from tightfit.core import hfmodel
from tightfit.core.edits import ChildEdit, Edit, Handle, StackEdit, TrainableEdit, is_planning
from tightfit.core.errors import StateError, UnsupportedModelError, shorten
from tightfit.core.fields import check_bool, check_choice, check_float, check_int, keep_tuples
from tightfit.core.transform import Context, Slot, Transform
from tightfit.methods.reversible.adapters import Mlp, maker, merge_edit, mlp_of, parallel_edits
from tightfit.methods.reversible.guard import headroom, refuse_inexact
from tightfit.methods.reversible.names import LAGGED, PARALLEL, TRAINED
from tightfit.methods.reversible.probe import Findings, UntriedError, probe
from tightfit.methods.reversible.runner import BITS, LARGEST_K, Coupling, Plan, Runner
from tightfit.methods.reversible.seam import check_cut, layers_of, seam_edits
from tightfit.methods.reversible.streams import Half
from tightfit.ops.fixed_point import finest

__all__ = ["Coupling", "Reversible"]

VARIANTS = ("two_step", "meft1", "meft2", "meft3")
MERGES = ("state", "mean", "weighted", "concat")
PUBLISHED = 0.1
HEADROOM = 4
"""Bits left for the states to grow in training."""
FEWEST = 6
"""Bits behind the point below which a model is not worth running."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reversible(Transform):
    """Blocks keep k bits per element instead of their inputs; backward gets those back and runs the block again.

    Two streams go through the stack, integers of 32 bits, so that a step can be undone without any error: gradients
    are exactly those of the forward that ran. That forward is not quite the stock one: with "two_step" each block adds
    the share 2^-k of how far the state before the last is from the last one. `anneal` takes the share to 0. Costs one
    more forward of every block, as checkpointing does, and about an eighth of its bytes (k = 4, float32).

    Fields:
        variant: "two_step"; "meft1", "meft2", "meft3" of the paper.
        exact: integer streams. False: float32 ones, whose errors grow with every block; a guard refuses what is too
            deep, see `anchors` and `allow_inexact`.
        k: the small factor is 2^-k, 0 to 12; k bits are kept.
        lam, beta: factors of the meft variants; None: the small one is 2^-k (0.1 where not exact), the other 1. In
            exact mode powers of two.
        span: (first, end) of the blocks that are reversible, in every stack; None: all.
        adapter_dim: train adapters of this inner width only (and a task head): one beside each MLP, for the meft
            variants another on the lagging stream. None: no adapters, what trains is up to the rest of the recipe.
        adapter_dropout, zero_up: dropout inside adapters; begin with adapters that do nothing.
        merge: how the streams become one state at the end: "state" (the state alone), "mean", "weighted" (state + 0.1
            lagging), "concat" (a trained map).
        anneal: the last share of the training in which the factor goes to 0, so that a plain model comes out.
        anchors: not exact only: keep both streams every so many blocks.
        tiles: behind a block's attention its tokens go on in so many parts, one after the other also in backward, each
            of 512 or more; where that cannot be (attention and MLP side by side, a mixture of experts, few tokens, or
            more parameters training in a block than its states have numbers) they go together.
        bits: of integers behind the point; None: from the largest state on an example batch, when applied.
        allow_inexact: not exact only: warn instead of refusing.
        strict: refuse blocks that do not repeat bit by bit; False: these keep their streams, with a warning.
        debug: check for overflow at once on a GPU too, where it else makes the loss NaN.

    Raises:
        TypeError, ValueError: a field out of range, or fields that do not go together; a span that the model does not
            have, or one too deep for floating point (when planned or applied).
        UnsupportedModelError: no stack of blocks, or blocks that change the shape of the states (when applied).
        StateError: the blocks are checkpointed already; states that are not finite or leave the range, or a parameter
            that was modified between forward and backward (in a step).

    Example:
        >>> import tightfit
        >>> tightfit.chain(tightfit.Lora(), tightfit.Reversible(k=3))
        chain(Lora(), Reversible(k=3))

    Source: MEFT, arXiv 2306.00477, sections 3 and 4. Deviations: "two_step" and integer streams are additions; the
    published form is `variant="meft1", exact=False, adapter_dim=8, merge="mean", allow_inexact=True`.
    """

    variant: str = "two_step"
    exact: bool = dataclasses.field(default_factory=lambda: True)  # type: ignore[misc]
    k: int = 4
    lam: float | None = None
    beta: float | None = None
    span: tuple[int, int] | None = None
    adapter_dim: int | None = None
    adapter_dropout: float = 0.0
    zero_up: bool = False
    merge: str = "state"
    anneal: float = 0.0
    anchors: int | None = None
    tiles: int = 4
    bits: int | None = None
    allow_inexact: bool = False
    strict: bool = False
    debug: bool = False

    name: ClassVar[str] = "reversible"
    paper: ClassVar[str] = "2306.00477"
    touches: ClassVar[frozenset[Slot]] = frozenset({Slot.TRAINABLE, Slot.NEW_PARAMETERS, Slot.BLOCKS})
    reversible: ClassVar[bool] = True
    summary: ClassVar[str] = "block inputs had back from outputs; a second stream runs through the blocks"

    def __post_init__(self) -> None:
        check_choice(self, "variant", VARIANTS)
        check_choice(self, "merge", MERGES)
        for field in ("exact", "zero_up", "allow_inexact", "strict", "debug"):
            check_bool(self, field)
        check_int(self, "k", 0, LARGEST_K)
        for field in ("lam", "beta"):
            check_float(self, field, 0, 1, open_low=True, optional=True)
        check_int(self, "adapter_dim", 1, optional=True)
        check_float(self, "adapter_dropout", 0, 1, open_high=True)
        check_float(self, "anneal", 0, 1)
        check_int(self, "anchors", 1, optional=True)
        check_int(self, "tiles", 1)
        check_int(self, "bits", 0, 28, optional=True)
        _check_span_field(self)
        self._check_together()

    def _check_together(self) -> None:
        for field in ("lam", "beta"):
            value = getattr(self, field)
            if value is None:
                continue
            if self.variant == "two_step":
                raise ValueError(f"Reversible({field}={value}): the factor of 'two_step' is 2^-k; give k instead")
            if self.exact and (math.frexp(value)[0] != 0.5 or value < 2.0**-LARGEST_K):
                raise ValueError(
                    f"Reversible({field}={value}): integer streams need a power of two from 2^-{LARGEST_K} to 1; give "
                    f"one, or exact=False"
                )
        if self.exact and (self.anchors is not None or self.allow_inexact):
            field = "anchors" if self.anchors is not None else "allow_inexact"
            raise ValueError(
                f"Reversible({field}={getattr(self, field)}): integer streams have no error to limit; leave it out"
            )
        if not self.exact and self.bits is not None:
            raise ValueError(
                f"Reversible(bits={self.bits}, exact=False): only integer streams have a point; leave it out"
            )
        if self.anneal and (self.variant != "two_step" or self.adapter_dim is not None or self.merge == "concat"):
            raise ValueError(
                f"Reversible(anneal={self.anneal}): only 'two_step' without adapters and without a trained merge "
                f"becomes a plain model"
            )
        if self.variant == "two_step" and self.k == 0:
            warnings.warn(
                "Reversible(k=0): with a factor of 1 a block adds the whole difference of the streams, which is far "
                "from the stock model",
                UserWarning,
                stacklevel=4,
            )

    def is_exact(self) -> bool:
        return False

    def freezes(self, model: nn.Module) -> Iterator[str]:
        return iter(()) if self.adapter_dim is None else hfmodel.body_parameters(model)

    def edits(self, model: nn.Module, context: Context) -> Iterator[Edit]:
        spans = self._spans(model)
        names = [name for span in spans for name in span]
        post_norm = next(hfmodel.norms_behind(model, names[0]), None) is None
        plan = Plan(
            halves=self._halves(),
            exact=self.exact,
            merge=self.merge,
            anchors=self.anchors or 0,
            post_norm=post_norm,
            allow_inexact=self.allow_inexact,
            anneal=self.anneal,
            debug=self.debug,
            tiles=self.tiles,
            bits=BITS if self.bits is None else self.bits,
        )
        if not self.exact:
            deepest = self.anchors or max(map(len, spans))
            refuse_inexact(plan.halves, post_norm, deepest, _dtype(model), self.allow_inexact, warn=_is_real(model))
        needs_mlp = self.adapter_dim is not None or self.variant == "meft3" or self.merge == "concat"
        mlps = {name: mlp_of(model, name) for name in names} if needs_mlp else {}
        cut = mlps if self.variant == "meft3" else self._tileable(model, names, mlps, post_norm)
        self._look(model, plan, spans, cut, post_norm)
        yield from self._new_parameters(model, mlps, spans)
        part = Coupling(plan, len(names))
        for span in spans:
            note = f"{self.variant}, {len(span)} blocks, " + (f"{self.k} bits per element" if self.exact else "inexact")
            yield StackEdit(blocks=span, runner=functools.partial(Runner, plan, span), part=part, note=note)
        if self.adapter_dim is not None:
            yield from parallel_edits(mlps)
        yield from seam_edits(cut, post_norm)
        yield LeavingEdit(coupling=part)

    def _tileable(self, model: nn.Module, names: list[str], mlps: dict[str, Mlp], post_norm: bool) -> dict[str, Mlp]:
        """The blocks that seem to be an attention and an MLP behind it; not those of experts with little room."""
        found = {}
        for name in names if self.tiles > 1 else ():
            if any("expert" in inner or "router" in inner for inner, _ in model.get_submodule(name).named_modules()):
                continue
            with contextlib.suppress(UnsupportedModelError):
                mlp = mlps.get(name) or mlp_of(model, name)
                layers_of(model, name, mlp, post_norm)
                found[name] = mlp
        return found

    def _halves(self) -> tuple[Half, ...]:
        small = 2.0**-self.k if self.exact or self.variant == "two_step" else PUBLISHED
        if self.variant == "two_step":
            return (Half("block", small, about=True),)
        first, second = {"meft1": (small, 1.0), "meft2": (1.0, small), "meft3": (small, small)}[self.variant]
        lam, beta = first if self.lam is None else self.lam, second if self.beta is None else self.beta
        if self.variant == "meft3":
            return Half("attention", lam), Half("mlp", beta)
        if self.variant == "meft1":
            return (Half("block", lam), *self._lagged(beta, reads=1))
        return (*self._lagged(lam, reads=0), Half("block", beta))

    def _lagged(self, factor: float, reads: int) -> tuple[Half, ...]:
        """The half of the lagging stream's adapter; without one there is nothing to add."""
        return () if self.adapter_dim is None else (Half("lagged", factor, reads=reads, turns=False),)

    def _spans(self, model: nn.Module) -> list[tuple[str, ...]]:
        stacks = hfmodel.stacks(model)
        if not stacks:
            raise UnsupportedModelError(f"Reversible: {type(model).__name__} has no stack of blocks")
        lengths = [len(stack) for stack in stacks]
        first, end = self.span or (0, max(lengths))
        if self.span is not None and end > min(lengths):
            raise ValueError(
                f"Reversible(span={self.span}): {type(model).__name__} has {shorten(lengths)} blocks, accepted is an "
                f"end of at most {min(lengths)}"
            )
        spans = [tuple(stack[first:end]) for stack in stacks]
        held = [n for span in spans for n in span if getattr(model.get_submodule(n), "gradient_checkpointing", False)]
        if held:
            raise StateError(
                f"Reversible: gradient checkpointing of this {type(model).__name__} is on already (at "
                f"{shorten(held, 2)}); call model.gradient_checkpointing_disable() first"
            )
        return spans

    def _look(self, model: nn.Module, plan: Plan, spans, cut: dict[str, Mlp], post_norm: bool) -> None:
        """Run the model once, where it has weights, and settle what depends on them; `cut` loses what has no halves."""
        if not _is_real(model):
            return
        check = check_cut(model, cut, post_norm, drop=self.variant != "meft3")
        try:
            findings = probe(model, spans, check)
        except UntriedError:
            if self.variant == "meft3" or (self.exact and self.bits is None):
                raise
            cut.clear()
            return
        if not self.exact:
            return
        if self.bits is None:
            plan.bits = self._bits(plan, findings.largest, post_norm, max(map(len, spans)))
        self._settle_unstable(plan, findings)

    def _bits(self, plan: Plan, largest: float, post_norm: bool, blocks: int) -> int:
        spare = headroom(plan.halves, post_norm, blocks)
        bits = finest(largest, HEADROOM + spare)
        if bits < FEWEST:
            raise ValueError(
                f"Reversible(variant={self.variant!r}, k={self.k}, lam={self.lam}, beta={self.beta}): states of up to "
                f"{largest:.3g} may grow {2.0**spare:.0e} times over {blocks} blocks, too far for 32 bits; give a "
                f"smaller factor (a larger k), or a shorter span=..."
            )
        return bits

    def _settle_unstable(self, plan: Plan, findings: Findings) -> None:
        if not findings.unstable:
            return
        problem = f"the second run of {shorten(findings.unstable, 3)} gave other bits than the first"
        if self.strict:
            raise UnsupportedModelError(
                f"Reversible(strict=True): {problem}; use deterministic kernels, or leave the blocks out with span=..."
            )
        warnings.warn(f"Reversible: {problem}, so these blocks keep both streams", UserWarning, stacklevel=2)
        plan.kept = frozenset(findings.unstable)

    def _new_parameters(self, model: nn.Module, mlps: dict[str, Mlp], spans) -> Iterator[Edit]:
        if self.adapter_dim is not None:
            frozen = tuple(self.freezes(model))
            yield TrainableEdit(parameters=frozen, trainable=False)
            for name, mlp in mlps.items():
                make = maker(mlp.width, self.adapter_dim, self.adapter_dropout, self.zero_up)
                note = f"width {self.adapter_dim}"
                yield ChildEdit(module=name, child=PARALLEL, make=make, trained=TRAINED, note=note)
                unread = self.variant == "meft1" and self.merge == "state" and any(name == span[-1] for span in spans)
                if self.variant != "two_step" and not unread:
                    yield ChildEdit(module=name, child=LAGGED, make=make, trained=TRAINED, note=note)
        if self.merge == "concat":
            for span in spans:
                yield merge_edit(span[-1], mlps[span[-1]].width)


def _check_span_field(value: Reversible) -> None:
    keep_tuples(value, "span")
    span = value.span
    if span is None:
        return
    whole = isinstance(span, tuple) and len(span) == 2
    if not whole or any(isinstance(i, bool) or not isinstance(i, int) for i in span):
        raise TypeError(f"Reversible(span=...): got {span!r}, accepted is a pair of ints (first, end)")
    if not 0 <= span[0] < span[1]:
        raise ValueError(f"Reversible(span=...): got {span}, accepted is 0 <= first < end")


def _is_real(model: nn.Module) -> bool:
    """Whether the model has weights, and not only their shapes."""
    return not is_planning() and all(hfmodel.has_values(p) for p in model.parameters())


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LeavingEdit(Edit):
    """Says in a merge or an export that the weights were trained with a second stream."""

    slot: Slot = Slot.BLOCKS
    coupling: Coupling

    @property
    def target(self) -> str:
        return "(export)"

    def run(self, model: nn.Module) -> Handle:
        return _LeavingHandle(self.coupling)


class _LeavingHandle(Handle):
    def __init__(self, coupling: Coupling):
        self.coupling = coupling

    def undo(self, model: nn.Module) -> None:
        pass

    def before_merge(self, model: nn.Module, verb: str) -> None:
        halves = self.coupling.plan.now()
        if halves is not None:
            warnings.warn(
                f"{verb}(): the weights were trained with a second stream (factor {halves[0].factor:g}), and a plain "
                f"{type(model).__name__} gives other logits with them; train the last steps with anneal=..., or save() "
                f"and load() the recipe",
                UserWarning,
                stacklevel=4,
            )
