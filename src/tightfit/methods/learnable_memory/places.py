"""Where memory goes in an image model: its blocks with their pre-attention norms, keys and values."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from tightfit.core import hfmodel
from tightfit.core.errors import UnsupportedModelError
from tightfit.core.simulate.batches import task_of

METHOD = "LearnableMemory"
NORMS = ("layernorm_before", "norm1", "layer_norm1", "norm_before")
PROJECTIONS = (("k_proj", "v_proj"), ("key", "value"))
"""Names that blocks give to the norm before attention, and to the keys' and values' projections."""


class NoEncoderError(UnsupportedModelError, ValueError):
    """The model is no image encoder with a class token."""


@dataclasses.dataclass(frozen=True)
class Places:
    """The parts of a model.

    Attributes:
        blocks: name of the list of blocks.
        depth: number of blocks.
        embeddings: name of the module that makes the tokens, which holds the class token.
        head: name of the classifier.
        width: of the tokens.
        labels: of the model's own head.
    """

    blocks: str
    depth: int
    embeddings: str
    head: str
    width: int
    labels: int

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the blocks."""
        return tuple(f"{self.blocks}.{index}" for index in range(self.depth))


def places_of(model: nn.Module) -> Places:
    """Find them, or refuse.

    Raises:
        NoEncoderError: the model classifies no images, or not from a class token.
        UnsupportedModelError: its blocks are not of the form norm, attention, residual; or its attention is not taken
            from transformers' registry.
    """
    name, base = hfmodel.backbone(model)
    embeddings: Any = getattr(base, "embeddings", None)
    if task_of(model) != "image" or not hasattr(embeddings, "cls_token"):
        raise NoEncoderError(
            f"{METHOD}: {type(model).__name__} is no image classifier with a class token (as ViT and DeiT are); memory "
            f"is defined for those"
        )
    if not hasattr(embeddings, "position_embeddings"):
        raise _refused(model, "its embeddings have no position_embeddings, whose first row a new class token takes")
    stacks = [stack for stack in hfmodel.stacks(model) if stack[0].startswith(f"{name}.")]
    if len(stacks) != 1:
        raise _refused(model, f"it has {len(stacks)} stacks of blocks")
    head = getattr(hfmodel.without_peft(model), "classifier", None)
    if not isinstance(head, nn.Linear):
        raise _refused(model, "it has no linear `classifier`")
    for block in stacks[0]:
        site_of(model.get_submodule(block), block)
    now = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if not getattr(base, "_supports_sdpa", False) or now not in ("sdpa", "eager"):
        raise _refused(model, f"its attention is {now!r}; load it with attn_implementation='sdpa' (or 'eager')")
    return Places(
        blocks=stacks[0][0].rsplit(".", 1)[0],
        depth=len(stacks[0]),
        embeddings=next(n for n, m in model.named_modules() if m is embeddings),
        head=next(n for n, m in model.named_modules() if m is head),
        width=int(embeddings.cls_token.shape[-1]),
        labels=head.out_features,
    )


@dataclasses.dataclass(frozen=True)
class Site:
    """What a block's memory goes through: its norm, and the projections of its attention."""

    attention: nn.Module
    norm: nn.Module
    key: nn.Module
    value: nn.Module


def site_of(block: nn.Module, name: str) -> Site:
    """The site of a block as it is now, adapter layers included.

    Raises:
        UnsupportedModelError: the block has another form.
    """
    norm = next((child for key in NORMS if (child := block._modules.get(key)) is not None), None)
    if norm is None:
        raise UnsupportedModelError(
            f"{METHOD}: {name} ({type(block).__name__}) has no norm before its attention (by the names "
            f"{', '.join(NORMS)}), which memory has to pass"
        )
    found = [
        (module, module._modules[key], module._modules[value])
        for module in block.modules()
        for key, value in PROJECTIONS
        if module._modules.get(key) is not None and module._modules.get(value) is not None
    ]
    if len(found) != 1:
        raise UnsupportedModelError(
            f"{METHOD}: {name} ({type(block).__name__}) has {len(found)} attention modules with projections of keys "
            f"and values of their own; memory needs one"
        )
    attention, key, value = found[0]
    if any(isinstance(m, nn.Module) and "norm" in type(m).__name__.lower() for m in attention.children()):
        raise UnsupportedModelError(f"{METHOD}: the attention of {name} norms its keys; memory is not defined for that")
    return Site(attention, norm, key, value)  # type: ignore[arg-type]


def _refused(model: nn.Module, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{METHOD}: {type(model).__name__} is not supported: {reason}")
