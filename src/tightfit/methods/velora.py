"""Velora: a linear layer keeps one number per group of channels of its input (arXiv 2405.17991)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import nn

from tightfit.core import hfmodel
from tightfit.core.edits import Edit, Part
from tightfit.core.errors import SelectorError, shorten
from tightfit.core.fields import check_choice, check_float, check_int, check_selector
from tightfit.core.transform import Context, Slot, Transform
from tightfit.methods.operators import estimator_edits, named_linears, padding_edit
from tightfit.ops.subtoken import INITS, Subtoken

VALUE = frozenset({"v_proj", "value", "value_proj", "v", "v_lin"})
DOWN = frozenset({"down_proj", "fc2", "wo", "lin2", "dense_4h_to_h", "ffn_output", "w2", "Wo", "c_proj"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Velora(Transform):
    """Keep `groups` numbers per token instead of a linear layer's input; its weight gradient is rank one per group.

    The input is cut into sub-tokens of I / groups channels, and of each its component along one direction is kept: 1 /
    128 of the bytes at I = 4096. Outputs, and the gradients of inputs and biases, stay exact. The weight gradient is
    biased: what of the input is orthogonal to the direction never trains the weight. With `Lora` it acts on the
    adapters' first matrices; a frozen weight keeps nothing. Under `FusedOps` a layer whose input can be rebuilt from
    what others keep gets its exact gradient, which costs no memory.

    Fields:
        groups: sub-tokens per token; fewer keep less.
        init: the direction: "batch_average_once", "batch_average", "random", "random_unbiased" (unbiased, with a
            relative variance of about I / groups - 1).
        scale: factor of the weight gradient; it matters to clipping and SGD, hardly to Adam.
        where: which linear layers of the blocks (patterns with `|` between them); None: value and down projections.
            Heads and poolers keep their whole input: one that begins from nothing does not learn from a part of it.

    Raises:
        TypeError, ValueError: a field out of range; more groups than a layer has channels (when applied).
        SelectorError: `where` matches no linear layer, the model has no layers of the default's names, or none of
            the layers trains under the recipe (when planned or applied).

    Example:
        >>> import tightfit
        >>> tightfit.chain(tightfit.Lora(), tightfit.Velora(groups=16, where="*_proj"))
        chain(Lora(), Velora(groups=16, where='*_proj'))

    Saves memory only where no other layer keeps the same input: a value projection reads what query and key read.
    Source: VeLoRA, arXiv 2405.17991, section 3. Deviations: the rebuilt input is never made; `random_unbiased`; a mean
    that vanishes or is no number gives the constant direction.
    """

    groups: int = 32
    init: str = "batch_average_once"
    scale: float = 1.0
    where: str | None = None

    name: ClassVar[str] = "velora"
    paper: ClassVar[str] = "2405.17991"
    touches: ClassVar[frozenset[Slot]] = frozenset({Slot.OPERATORS})
    exact: ClassVar[bool] = False
    reversible: ClassVar[bool] = True
    summary: ClassVar[str] = "a few numbers per token instead of a linear layer's input"

    def __post_init__(self) -> None:
        check_int(self, "groups", 1)
        check_choice(self, "init", INITS)
        check_float(self, "scale", 0, open_low=True)
        check_selector(self, "where", optional=True)

    def edits(self, model: nn.Module, context: Context) -> Iterator[Edit]:
        targets = self._targets(model)
        for target in targets:
            width = _width(hfmodel.stock_module(model, target))
            if self.groups > width:
                raise ValueError(
                    f"Velora(groups={self.groups}): {target} has {width} input channels; give at most {width} groups, "
                    f"or leave the layer out with where="
                )
        part = Directions(self)
        note = f"{self.groups} numbers per token"
        yield from estimator_edits(model, targets, part.add, method="Velora", part=part, note=note, only=_reads_input)
        if self.init.startswith("batch_average"):
            yield from padding_edit(model)

    def _targets(self, model: nn.Module) -> list[str]:
        if self.where is not None:
            return self._in_blocks(model, named_linears(model, self.where, method="Velora"))
        targets = value_and_down(model)
        if not targets:
            raise SelectorError(
                f"Velora: the blocks of {type(model).__name__} hold no value or down projection of a known name "
                f"({shorten(sorted(VALUE | DOWN), 20)}); name the layers with where="
            )
        return targets

    def _in_blocks(self, model: nn.Module, names: list[str]) -> list[str]:
        blocks = {name.removesuffix(".base_layer") for name in hfmodel.block_linears(model)}
        inside = [name for name in names if name in blocks] if blocks else names
        if not inside:
            raise SelectorError(
                f"Velora(where={self.where!r}): {shorten(names, 3)} of {type(model).__name__} lie outside the blocks, "
                f"and heads do not learn from a part of their input; accepted are layers in the blocks, as in where='*'"
            )
        return inside


class Directions(Part):
    """The directions of the layers, which are no tensors of the model."""

    def __init__(self, transform: Velora) -> None:
        self.transform = transform
        self.codecs: dict[str, Subtoken] = {}

    def add(self, name: str, layer: nn.Module) -> dict[str, Any]:
        """The state of one more layer."""
        t = self.transform
        codec = Subtoken(_width(layer), t.groups, t.init, t.scale, seed=len(self.codecs))
        self.codecs[name] = codec
        return {"codec": codec}

    def report(self) -> dict[str, Any]:
        sizes = sorted({codec.size for codec in self.codecs.values()})
        return {
            "layers": len(self.codecs),
            "channels_per_number": sizes,
            "directions_settled": sum(codec.settled for codec in self.codecs.values()),
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        return {f"{name}/{key}": t for name, codec in self.codecs.items() for key, t in codec.state().items()}

    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, codec in self.codecs.items():
            prefix = f"{name}/"
            codec.load_state({k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)})


def value_and_down(model: nn.Module) -> list[str]:
    """The value projections and the last layers of the MLPs in the blocks, by the names that models give them.

    >>> from tightfit import skeleton
    >>> from transformers import BertConfig
    >>> [name.removeprefix("encoder.layer.") for name in value_and_down(skeleton(BertConfig(num_hidden_layers=1)))]
    ['0.attention.self.value', '0.output.dense']
    """
    blocks = [block for stack in hfmodel.stacks(model) for block in stack]
    found = []
    for name in hfmodel.block_linears(model):
        block = next(block for block in blocks if name.startswith(f"{block}."))
        if _is_value_or_down(name.removeprefix(f"{block}.").removesuffix(".base_layer")):
            found.append(name.removesuffix(".base_layer"))
    return found


def _is_value_or_down(inside: str) -> bool:
    last = inside.rsplit(".", 1)[-1]
    # the output projection of an attention may have the name that an MLP's last layer has elsewhere
    of_attention = "att" in inside.lower()
    return last in VALUE or (not of_attention and (last in DOWN or inside.endswith("output.dense")))


def _reads_input(name: str) -> bool:
    """Whether a layer reads what the stock layer reads; an adapter's second matrix reads what the first gives."""
    return ".lora_B." not in name


def _width(layer: Any) -> int:
    return layer.weight.shape[0] if hfmodel.is_conv1d(layer) else layer.in_features
