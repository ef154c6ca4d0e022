"""Which tensors of a model have one row per vocabulary id, grouped by identity, never by config flags."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from tightfit.core import hfmodel
from tightfit.core.errors import UnsupportedModelError


@dataclasses.dataclass(frozen=True)
class VocabularyTensor:
    """One tensor with a vocabulary dimension, and every place that holds it."""

    tensor: torch.Tensor
    aliases: tuple[hfmodel.Alias, ...]
    dim: int


@dataclasses.dataclass(frozen=True)
class Tables:
    """A model's vocabulary-sized tensors by role.

    Attributes:
        size: V, rows of the input table.
        lookups: names of the embedding modules that are given token ids.
        inputs: the distinct input tables (several only where encoder and decoder do not share one).
        head: name of the output layer, None for a model that predicts no tokens.
        output: the head's weight; one of `inputs` when tied.
        biases: the head's bias parameters (V,).
        constants: buffers added to the logits, (1, V).
        beside: names of layers next to the head that have a vocabulary dimension too (MobileBERT's head reads one).
    """

    size: int
    lookups: tuple[str, ...]
    inputs: tuple[VocabularyTensor, ...]
    head: str | None
    output: VocabularyTensor | None
    biases: tuple[VocabularyTensor, ...]
    constants: tuple[VocabularyTensor, ...]
    beside: tuple[str, ...] = ()

    @property
    def tied(self) -> bool:
        return self.output is not None and any(self.output.tensor is t.tensor for t in self.inputs)

    @property
    def all(self) -> tuple[VocabularyTensor, ...]:
        extra = () if self.output is None or self.tied else (self.output,)
        return (*self.inputs, *extra, *self.biases, *self.constants)


def find_tables(model: nn.Module) -> Tables:
    """Find the vocabulary-sized tensors of a model.

    Raises:
        UnsupportedModelError: no input embedding that is a plain floating-point table.
    """
    table = _input_embedding(model)
    if table is None:
        raise UnsupportedModelError(
            f"PartialEmbedding: {type(model).__name__} has no token embedding (get_input_embeddings() gives none)"
        )
    size = table.weight.shape[0]
    lookups = _lookups(model, table)
    weights: list[Any] = list(dict.fromkeys(model.get_submodule(name).weight for name in lookups))
    inputs = tuple(_tensor(model, weight) for weight in weights)
    if not all(t.aliases for t in inputs):  # made anew for each call (PEFT's trainable tokens)
        raise UnsupportedModelError(
            f"PartialEmbedding: the token embedding of {type(model).__name__} is a {type(table).__name__}, accepted is "
            f"a table without adapters; leave the embedding out of these, or PartialEmbedding out of the recipe"
        )
    head = _head(model, size)
    output = biases = None
    if head is not None:
        module: Any = model.get_submodule(head)
        output = next((t for t in inputs if t.tensor is module.weight), None) or _tensor(model, module.weight)
        bias = getattr(module, "bias", None)
        biases = () if bias is None else (_tensor(model, bias),)
    constants = tuple(
        _tensor(model, buffer, dim=1)
        for buffer in model._buffers.values()
        if buffer is not None and _is_constant(buffer, size)
    )
    beside = () if head is None else tuple(_beside(model, head, size))
    found = Tables(size, lookups, inputs, head, output, biases or (), constants, beside)
    for vocabulary_tensor in found.all:
        _refuse_packed(vocabulary_tensor, found.size)
    return found


def _input_embedding(model: nn.Module) -> Any:
    getter = getattr(model, "get_input_embeddings", None)
    try:
        table = getter() if getter is not None else None
    except (NotImplementedError, AttributeError):
        return None
    return (
        table
        if table is not None and torch.is_tensor(getattr(table, "weight", None)) and table.weight.dim() == 2
        else None
    )


def _lookups(model: nn.Module, table: Any) -> tuple[str, ...]:
    """The embedding modules that receive ids: the table, its aliases, and those of every inner backbone."""
    own = {id(table)}
    for module in model.modules():
        if hasattr(module, "get_input_embeddings"):
            inner = _input_embedding(module)
            if inner is not None and inner.weight.shape[0] == table.weight.shape[0]:
                own.add(id(inner))
    names = []
    for name, module in model.named_modules(remove_duplicate=True):
        weight = getattr(module, "_parameters", {}).get("weight")
        if id(module) in own or (isinstance(module, nn.Embedding) and weight is table.weight):
            names.append(name)
    return tuple(names)


def _head(model: nn.Module, size: int) -> str | None:
    if not hfmodel.has_lm_head(model):
        return None
    head = model.get_output_embeddings()  # type: ignore[operator]
    weight = getattr(head, "weight", None)
    if weight is None or weight.shape[0] != size or not hfmodel.is_linear(head) or hfmodel.is_conv1d(head):
        raise UnsupportedModelError(
            f"PartialEmbedding: the output layer of {type(model).__name__} is a {type(head).__name__} that does not "
            f"have one row for each of the {size} rows of the input table"
        )
    return next(name for name, module in model.named_modules() if module is head)


def _beside(model: nn.Module, head: str, size: int) -> Iterator[str]:
    parent = head.rpartition(".")[0]
    own = model.get_submodule(head)
    for name, child in model.get_submodule(parent).named_children():
        if child is not own and hfmodel.is_linear(child) and size in child.weight.shape:  # type: ignore[operator, union-attr]
            yield f"{parent}.{name}" if parent else name


def _tensor(model: nn.Module, tensor: torch.Tensor, dim: int = 0) -> VocabularyTensor:
    return VocabularyTensor(tensor, tuple(hfmodel.aliases(model, tensor)), dim)


def _is_constant(buffer: torch.Tensor, size: int) -> bool:
    return buffer.dim() == 2 and buffer.shape == (1, size) and buffer.is_floating_point()


def _refuse_packed(found: VocabularyTensor, size: int) -> None:
    tensor, name = found.tensor, found.aliases[0].name
    plain = type(tensor) in (nn.Parameter, torch.Tensor) or type(tensor).__name__ == "FakeTensor"
    if not plain or not tensor.is_floating_point() or tensor.shape[found.dim] != size:
        raise UnsupportedModelError(
            f"PartialEmbedding: {name} is a {type(tensor).__name__} of dtype {tensor.dtype} and shape "
            f"{tuple(tensor.shape)}; rows can only be taken from plain floating-point tables (load the embedding "
            f"unquantised, as bitsandbytes and torchao do by default)"
        )
