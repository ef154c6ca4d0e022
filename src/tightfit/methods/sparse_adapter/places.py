"""The MLPs of a model: the layer that reads their input and the one that makes their output."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

from torch import nn

from tightfit.core import hfmodel
from tightfit.core.errors import SelectorError, UnsupportedModelError, shorten
from tightfit.core.select import select


@dataclasses.dataclass(frozen=True)
class Mlp:
    """One MLP.

    Attributes:
        name: the module that holds its layers: the MLP module, or the block where there is none.
        block: the block.
        up, down: its first and its last linear layer, by their names in the model.
        width: of the states.
        inner: of the hidden layer.
    """

    name: str
    block: str
    up: str
    down: str
    width: int
    inner: int


def find_mlps(model: nn.Module) -> list[Mlp]:
    """The MLPs of the blocks, in model order: a block's last linear layer, and the first that makes what it reads.

    >>> from tightfit import skeleton
    >>> from transformers import LlamaConfig
    >>> tiny = LlamaConfig(num_hidden_layers=1, hidden_size=8, intermediate_size=16, num_attention_heads=2)
    >>> find_mlps(skeleton(tiny, task="causal-lm"))[0].up
    'model.layers.0.mlp.gate_proj'
    """
    found = [_mlp_of(model, block) for stack in hfmodel.stacks(model) for block in stack]
    return [mlp for mlp in found if mlp is not None]


def chosen_mlps(model: nn.Module, where: str | None) -> list[Mlp]:
    """The MLPs that `where` names, by the names of the modules that hold them; None: all.

    Raises:
        SelectorError: a pattern names no MLP.
        UnsupportedModelError: the model has none.
    """
    found = find_mlps(model)
    if not found:
        raise UnsupportedModelError(
            f"SparseAdapter: {type(model).__name__} has no block that ends in an MLP of linear layers (width to inner, "
            f"inner to the same width) to stand beside"
        )
    if where is None:
        return found
    holders = {id(hfmodel.stock_module(model, mlp.name)) for mlp in found}
    try:
        names = set(select(model, where, kind=lambda module: id(module) in holders, method="SparseAdapter"))
    except SelectorError as error:
        raise SelectorError(f"{error}; its MLPs are {shorten([mlp.name for mlp in found], 4)}") from None
    return [mlp for mlp in found if mlp.name in names]


def _mlp_of(model: nn.Module, block: str) -> Mlp | None:
    linears = [
        (f"{block}.{key.removesuffix('.base_layer')}", *_sizes(module))
        for key, module in hfmodel.stock_modules(model.get_submodule(block))
        # an attention's last layer may be a block's last one: a mixture of experts holds stacked weights
        if hfmodel.is_linear(module) and "att" not in key.lower()
    ]
    if not linears:
        return None
    down, inner, width = linears[-1]
    parent = down.rpartition(".")[0]
    above = [name for name, a, b in linears[:-1] if (a, b) == (width, inner)]
    near = [name for name in above if name.rpartition(".")[0] == parent] or above
    if not near:
        return None
    shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(near[0].split("."), down.split(".")))
    return Mlp(".".join(part for part, _ in shared), block, near[0], down, width, inner)


def _sizes(layer: Any) -> tuple[int, int]:
    """(inputs, outputs) of a linear layer, quantised or transposed."""
    return tuple(layer.weight.shape) if hfmodel.is_conv1d(layer) else (layer.in_features, layer.out_features)
