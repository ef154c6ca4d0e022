"""Checkpointing: the model's own gradient checkpointing as a transform (arXiv 1604.06174)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

from torch import nn

from tightfit.core import hfmodel
from tightfit.core.edits import CallEdit, Edit, Handle
from tightfit.core.errors import StateError, UnsupportedModelError
from tightfit.core.fields import check_bool
from tightfit.core.transform import Context, Slot, Transform


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpointing(Transform):
    """Keep only each block's input and run the block again in the backward pass; the model's own feature.

    Gradients are those of the stock step. Costs one more forward of every block (16 to 32 % of the step time).

    Fields:
        offload: keep the blocks' inputs in host memory while they wait (pinned where there is a GPU).

    Raises:
        TypeError: a field is not a bool.
        UnsupportedModelError: the model does not support gradient checkpointing (when planned or applied).

    Example:
        >>> import tightfit
        >>> tightfit.chain(tightfit.Checkpointing())
        chain(Checkpointing())

    Source: sublinear memory cost, arXiv 1604.06174, section 3, through transformers'
    `gradient_checkpointing_enable` (non-reentrant). The KV cache is switched off in training, as it must be.
    """

    offload: bool = False

    name: ClassVar[str] = "checkpointing"
    paper: ClassVar[str] = "1604.06174"
    touches: ClassVar[frozenset[Slot]] = frozenset({Slot.RECOMPUTE, Slot.SAVED_TENSORS})
    exact: ClassVar[bool] = True
    reversible: ClassVar[bool] = True
    summary: ClassVar[str] = "recompute each block in the backward pass (the model's own)"

    def __post_init__(self) -> None:
        check_bool(self, "offload")

    def edits(self, model: nn.Module, context: Context) -> Iterator[Edit]:
        if not getattr(model, "supports_gradient_checkpointing", False):
            raise UnsupportedModelError(
                f"Checkpointing: {type(model).__name__} does not support gradient checkpointing in transformers"
            )
        if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            raise StateError(
                f"Checkpointing: gradient checkpointing of this {type(model).__name__} is on already; call "
                f"model.gradient_checkpointing_disable() first"
            )
        blocks = tuple(block for stack in hfmodel.stacks(model) for block in stack)
        yield CheckpointEdit(blocks=blocks, note=f"{len(blocks)} blocks")
        if self.offload:
            yield CallEdit(slot=Slot.SAVED_TENSORS, where="backbone", mixin=OffloadMixin, exclusive=True)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class CheckpointEdit(Edit):
    """Switch the model's own gradient checkpointing on."""

    slot: Slot = Slot.RECOMPUTE
    exclusive: bool = True
    blocks: tuple[str, ...]

    @property
    def target(self) -> str:
        return "blocks"

    def claims(self):
        return frozenset((self.slot, block) for block in self.blocks)

    def run(self, model: nn.Module) -> Handle:
        return _CheckpointHandle(model)


class _CheckpointHandle(Handle):
    def __init__(self, model: nn.Module):
        self.state = {name: dict(_own(module)) for name, module in model.named_modules()}
        _enable(model)

    def undo(self, model: nn.Module) -> None:
        for name, module in model.named_modules():
            for key in _FLAGS:
                vars(module).pop(key, None)
            vars(module).update(self.state.get(name, {}))


def _enable(model: Any) -> None:
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # the name since transformers 5.2x
        model.activation_checkpointing_enable(options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


_FLAGS = ("gradient_checkpointing", "_gradient_checkpointing_func")


def _own(module: nn.Module) -> dict[str, Any]:
    return {key: vars(module)[key] for key in _FLAGS if key in vars(module)}


class OffloadMixin:
    """Keeps what the backbone saves for backward, the blocks' inputs under checkpointing, in host memory."""

    def __call__(self, *args, **kwargs):
        import torch

        if not (self.training and torch.is_grad_enabled()):  # type: ignore[attr-defined]
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        with torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()):
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
