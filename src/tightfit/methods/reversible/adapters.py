"""Adapters of reversible blocks: beside the MLP, and of the lagging stream."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tightfit.core import hfmodel
from tightfit.core.edits import ChildEdit, Edit, ModulesEdit, is_planning
from tightfit.core.errors import UnsupportedModelError
from tightfit.core.tight import state_of
from tightfit.core.transform import Slot
from tightfit.methods.reversible.names import MERGE, PARALLEL, TRAINED

SPREAD = 0.02
"""Standard deviation of new weights."""


class Adapter(nn.Module):
    """U relu(V x), without a residual of its own; in float32 where the model is in half precision."""

    def __init__(self, width: int, inner: int, dropout: float, zero_up: bool, like: Tensor):
        super().__init__()
        self.down, self.up = _linear(width, inner, like), _linear(inner, width, like, spread=0.0 if zero_up else SPREAD)
        self.rate = dropout

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.down(x.to(self.down.weight.dtype)))
        return self.up(F.dropout(inner, self.rate, self.training)).to(x.dtype)


def _linear(width: int, out: int, like: Tensor, spread: float = SPREAD, bias: bool = True) -> nn.Linear:
    """A linear layer of normal weights; while planning one without values, which draws no random numbers."""
    half = like.dtype in (torch.float16, torch.bfloat16) or not like.is_floating_point()
    device = torch.device("meta") if is_planning() else like.device
    dtype = torch.float32 if half else like.dtype
    layer = nn.utils.skip_init(nn.Linear, width, out, bias=bias, device=device, dtype=dtype)
    if not layer.weight.is_meta:
        nn.init.normal_(layer.weight, std=spread)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return layer


@dataclasses.dataclass(frozen=True)
class Mlp:
    """The first and the last linear layer of a block's MLP by their names in the block; the width of the states."""

    up: str
    down: str
    width: int


def mlp_of(model: nn.Module, name: str) -> Mlp:
    """The MLP of a block: its last linear layer, and the first one that makes what that layer reads.

    Raises:
        UnsupportedModelError: the block has no such pair (a mixture of experts, say).
    """
    linears = [
        (key.removesuffix(".base_layer"), *_sizes(module))
        for key, module in hfmodel.stock_modules(model.get_submodule(name))
        if hfmodel.is_linear(module) and "att" not in key.lower()
    ]
    if linears:
        down, inner, width = linears[-1]
        parent = down.rpartition(".")[0]
        # twice the inner width: a gate and what it gates in one layer
        above = [n for n, a, b in linears[:-1] if a == width and b in (inner, 2 * inner)]
        near = [n for n in above if n.rpartition(".")[0] == parent] or above
        if near:
            return Mlp(near[0], down, width)
    raise UnsupportedModelError(
        f"Reversible: block {name} has no MLP of two linear layers, which adapter_dim=..., merge='concat' and "
        f"variant='meft3' go by; leave these out"
    )


def _sizes(layer: Any) -> tuple[int, int]:
    """(inputs, outputs) of a linear layer, quantised or transposed."""
    return tuple(layer.weight.shape) if hfmodel.is_conv1d(layer) else (layer.in_features, layer.out_features)


class Beside:
    """What an adapter beside an MLP reads, from the first layer's call to the last one's."""

    def __init__(self, adapter: nn.Module):
        self.adapter, self.x = adapter, None


class TakesInput:
    """The first layer of an MLP, whose input the adapter reads too."""

    def forward(self, x):
        state_of(self, TakesInput)["beside"].x = x  # type: ignore[arg-type]
        return super().forward(x)  # type: ignore[misc]


class AddsAdapter:
    """The last layer of an MLP, which adds what the adapter makes."""

    def forward(self, x):
        beside = state_of(self, AddsAdapter)["beside"]  # type: ignore[arg-type]
        given, beside.x = beside.x, None
        return super().forward(x) + beside.adapter(given)  # type: ignore[misc]


def maker(width: int, inner: int, dropout: float, zero_up: bool) -> Callable[[nn.Module], nn.Module]:
    """Makes an adapter for a block."""
    return lambda block: Adapter(width, inner, dropout, zero_up, _like(block))


def merge_edit(name: str, width: int) -> Edit:
    """A trained map from both streams to one state, which begins as the state alone."""

    def make(block: nn.Module) -> nn.Module:
        layer = _linear(2 * width, width, _like(block), bias=False)
        if not layer.weight.is_meta:
            with torch.no_grad():
                layer.weight.zero_()[:, width:].fill_diagonal_(1.0)
        return layer

    return ChildEdit(module=name, child=MERGE, make=make, trained=TRAINED, note="merges the streams")


def _like(block: nn.Module) -> Tensor:
    floating = [p for p in block.parameters() if p.is_floating_point()]
    return floating[0] if floating else next(block.parameters())


def parallel_edits(places: Mapping[str, Mlp]) -> Iterator[Edit]:
    """Edits that put adapters beside the MLPs of blocks; the adapters themselves are there already."""
    holds: dict[str, Beside] = {}

    def find(layer: Callable[[Mlp], str]):
        def found(model: nn.Module):
            out = []
            for name, mlp in places.items():
                if name not in holds:
                    holds[name] = Beside(getattr(model.get_submodule(name), PARALLEL))
                out.append((hfmodel.stock_module(model, f"{name}.{layer(mlp)}"), {"beside": holds[name]}))
            return out

        return found

    note = f"{len(places)} adapters beside MLPs"
    yield ModulesEdit(
        slot=Slot.BLOCKS, kind="adapter input", mixin=TakesInput, find=find(lambda mlp: mlp.up), note=note
    )
    yield ModulesEdit(
        slot=Slot.BLOCKS, kind="adapter sum", mixin=AddsAdapter, find=find(lambda mlp: mlp.down), note=note
    )
