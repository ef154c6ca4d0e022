"""Small transforms, one for each kind of edit, written as a method would be; used by the battery and the core tests."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tightfit.core import hfmodel
from tightfit.core.edits import (
    CallEdit,
    ModuleEdit,
    ParameterEdit,
    Part,
    StackEdit,
    StackRunner,
    TrainableEdit,
)
from tightfit.core.select import select
from tightfit.core.tight import state_of
from tightfit.core.transform import Slot, Transform

# -- parameter edit: a frozen token table held in half precision ------------------------------------------------------


class HalfCodec:
    """Keeps the upper half of each value in the model and the rest aside, so nothing is lost."""

    def __init__(self, full):
        self.dtype = full.dtype
        self.low = full - full.bfloat16().to(full.dtype)

    def encode(self, full):
        return full.bfloat16()

    def load(self, full):
        self.low = full - full.bfloat16().to(full.dtype)
        return self.encode(full)

    def decode(self, small):
        return small.to(self.dtype) + self.low.to(small.device)

    def residue(self):
        return self.low


class CastLinear:
    """A linear whose weight has another dtype than its input."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), self.bias)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HalfTable(Transform):
    """The input embedding, frozen and in bfloat16, on all its aliases."""

    name: ClassVar[str] = "test-half-table"
    touches: ClassVar[frozenset[Slot]] = frozenset({Slot.WEIGHTS, Slot.TRAINABLE, Slot.OPERATORS})
    reversible: ClassVar[bool] = True

    def freezes(self, model):
        return [alias.name for alias in self._aliases(model)]

    def _aliases(self, model):
        return hfmodel.aliases(model, model.get_input_embeddings().weight)

    def edits(self, model, context):
        aliases = tuple(self._aliases(model))
        yield ParameterEdit(aliases=aliases, codec=HalfCodec)
        yield TrainableEdit(slot=Slot.TRAINABLE, parameters=(aliases[0].name,), trainable=False)
        for alias in aliases:
            if hfmodel.is_linear(model.get_submodule(alias.module_name)):
                yield ModuleEdit(module=alias.module_name, mixin=CastLinear)


# -- module edit: a linear with its own backward ----------------------------------------------------------------------


class _OwnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, transposed):
        ctx.save_for_backward(x, weight)
        ctx.transposed, ctx.has_bias = transposed, bias is not None
        return F.linear(x, weight.t() if transposed else weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows, flat = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        grad_x = grad @ (weight.t() if ctx.transposed else weight)
        grad_weight = flat.t() @ rows if ctx.transposed else rows.t() @ flat
        return grad_x, grad_weight, rows.sum(0) if ctx.has_bias else None, None


class OwnLinearMixin:
    def forward(self, x):
        if not (self.training and torch.is_grad_enabled() and self.weight.requires_grad):
            return super().forward(x)
        weight, bias = self.weight, self.bias
        kind = x.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        return _OwnLinear.apply(x, weight, bias, state_of(self, OwnLinearMixin)["transposed"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnLinear(Transform):
    """The blocks' linear layers with a backward of our own."""

    where: str | None = None
    alone: bool = False

    name: ClassVar[str] = "test-own-linear"
    touches: ClassVar[frozenset[Slot]] = frozenset({Slot.OPERATORS})
    exact: ClassVar[bool] = True
    reversible: ClassVar[bool] = True

    def edits(self, model, context):
        names = select(model, self.where, kind=hfmodel.is_linear) if self.where else hfmodel.block_linears(model)
        for name in names:
            yield ModuleEdit(module=name, mixin=OwnLinearMixin, state=_transposed, exclusive=self.alone)


def _transposed(module):
    return {"transposed": hfmodel.is_conv1d(module)}


class OtherLinearMixin:
    def forward(self, x):
        return super().forward(x)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OtherLinear(Transform):
    """Another edit of the same layers, which shares them unless `alone`."""

    alone: bool = False

    name: ClassVar[str] = "test-other-linear"
    touches: ClassVar[frozenset[Slot]] = frozenset({Slot.OPERATORS})
    exact: ClassVar[bool] = True
    reversible: ClassVar[bool] = True

    def edits(self, model, context):
        for name in hfmodel.block_linears(model):
            yield ModuleEdit(module=name, mixin=OtherLinearMixin, exclusive=self.alone)


# -- stack edit: checkpointing of our own -----------------------------------------------------------------------------


class TapeRunner(StackRunner):
    """Keeps each block's input on a tape and runs the block again in the backward pass."""

    def __init__(self):
        self.tapes: list[list[int]] = []

    def open(self, hidden):
        self.tapes.append([])
        return self.tapes[-1]

    def block(self, tape, index, last, forward, hidden, args, kwargs):
        tape.append(index)
        if not torch.is_grad_enabled():
            return forward(hidden, *args, **kwargs)
        return checkpoint(forward, hidden, *args, use_reentrant=False, **kwargs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tape(Transform):
    """Every stack of blocks under one tape per forward."""

    name: ClassVar[str] = "test-tape"
    touches: ClassVar[frozenset[Slot]] = frozenset({Slot.BLOCKS})
    exact: ClassVar[bool] = True
    reversible: ClassVar[bool] = True

    def edits(self, model, context):
        for blocks in hfmodel.stacks(model):
            yield StackEdit(blocks=tuple(blocks), runner=TapeRunner)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OtherTape(Tape):
    """A second method that runs blocks."""

    name: ClassVar[str] = "test-other-tape"


# -- call edits -------------------------------------------------------------------------------------------------------


class Counter(Part):
    """How often the model was called; saved with the recipe."""

    def __init__(self):
        self.calls = torch.zeros((), dtype=torch.int64)

    def report(self):
        return {"calls": int(self.calls)}

    def tensors(self):
        return {"calls": self.calls}

    def load_tensors(self, tensors):
        self.calls = tensors["calls"].clone()


class CountMixin:
    def forward(self, *args, **kwargs):
        counter = state_of(self, CountMixin)["counter"]
        counter.calls = counter.calls + 1
        return super().forward(*args, **kwargs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CountCalls(Transform):
    """Counts the calls of the model."""

    name: ClassVar[str] = "test-count-calls"
    touches: ClassVar[frozenset[Slot]] = frozenset({Slot.INPUTS})
    exact: ClassVar[bool] = True
    reversible: ClassVar[bool] = True

    def edits(self, model, context):
        counter = Counter()
        yield CallEdit(where="model", mixin=CountMixin, state=lambda m: {"counter": counter}, part=counter)


class SwapMixin:
    def __call__(self, *args, **kwargs):
        ids = kwargs.get("input_ids")
        if self.training and ids is not None:
            rate = state_of(self, SwapMixin)["rate"]
            hit = torch.rand(ids.shape, device=ids.device) < rate
            kwargs["input_ids"] = torch.where(hit, ids.roll(1, -1), ids)
        return super().__call__(*args, **kwargs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SwapTokens(Transform):
    """Replaces some tokens by their left neighbour while training: a call edit of the backbone that draws numbers."""

    rate: float = 0.2

    name: ClassVar[str] = "test-swap-tokens"
    touches: ClassVar[frozenset[Slot]] = frozenset({Slot.INPUTS})
    reversible: ClassVar[bool] = True

    def edits(self, model, context):
        yield CallEdit(where="backbone", mixin=SwapMixin, state=lambda m: {"rate": self.rate})


# -- an edit that fails -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fails(Transform):
    """Runs into an error in the last slot, when everything else has been applied."""

    name: ClassVar[str] = "test-fails"
    touches: ClassVar[frozenset[Slot]] = frozenset({Slot.OPTIMIZER})

    def edits(self, model, context):
        yield ModuleEdit(slot=Slot.OPTIMIZER, module="", mixin=CountMixin, state=_fail)


def _fail(module: nn.Module):
    raise ZeroDivisionError("the edit failed half-way")
