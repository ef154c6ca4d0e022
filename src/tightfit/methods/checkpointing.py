"""Checkpointing: the model's own gradient checkpointing as a transform (arXiv 1604.06174)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import nn

from tightfit.core import hfmodel
from tightfit.core.edits import CallEdit, Edit, Handle
from tightfit.core.errors import StateError, UnsupportedModelError
from tightfit.core.fields import check_bool
from tightfit.core.transform import Context, Slot, Transform


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpointing(Transform):
    """Keep only each block's input and run the block again in the backward pass; the model's own feature.

    Gradients are those of the stock step; it costs one more forward of every block.

    Fields:
        offload: keep the blocks' inputs in pinned host memory while they wait; on a CPU model it changes nothing.

    Raises:
        TypeError: a field is not a bool.
        UnsupportedModelError: the model does not support gradient checkpointing, or has a prefix that is trained (when
            planned or applied).

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

    @classmethod
    def candidates(cls, model: nn.Module) -> Iterator[Checkpointing]:
        if getattr(model, "supports_gradient_checkpointing", False):
            yield cls()

    def edits(self, model: nn.Module, context: Context) -> Iterator[Edit]:
        if not getattr(model, "supports_gradient_checkpointing", False):
            raise UnsupportedModelError(
                f"Checkpointing: {type(model).__name__} does not support gradient checkpointing in transformers"
            )
        prefixes = {"PREFIX_TUNING", "CARTRIDGE"}.intersection(hfmodel.prompt_learning(model))
        if prefixes:
            raise UnsupportedModelError(
                f"Checkpointing: {prefixes.pop()} gives every block keys and values in a cache, and a block that runs "
                f"again takes none, so the prefix would not train; leave Checkpointing out"
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
    def __init__(self, model: Any):
        self.state = [(module, _own(module)) for module in model.modules()]
        try:
            _enable(model)
        except BaseException:
            self.undo(model)
            raise
        # transformers makes the embeddings' outputs require gradients, which only reentrant checkpointing needs
        for module, before in self.state:
            for hook in vars(module).get("_require_grads_hooks", []):
                if hook not in before.get("_require_grads_hooks", []):
                    hook.remove()
            _restore(module, before, _HOOKS)

    def undo(self, model: nn.Module) -> None:
        for module, before in self.state:
            _restore(module, before, _FLAGS)


_FLAGS = ("gradient_checkpointing", "_gradient_checkpointing_func")
_HOOKS = ("_require_grads_hooks", "_require_grads_hook")


def _own(module: nn.Module) -> dict[str, Any]:
    return {key: vars(module)[key] for key in (*_FLAGS, *_HOOKS) if key in vars(module)}


def _restore(module: nn.Module, before: dict[str, Any], keys: tuple[str, ...]) -> None:
    for key in keys:
        vars(module).pop(key, None)
        if key in before:
            vars(module)[key] = before[key]


def _enable(model: Any) -> None:
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # the other name is deprecated since transformers 5.22
        model.activation_checkpointing_enable(options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


class OffloadMixin:
    """Keeps what the backbone saves for backward, the blocks' inputs under checkpointing, in host memory.

    Parameters stay where they are, and tensors that are on the host already are not copied.
    """

    def __call__(self, *args, **kwargs):
        if not (self.training and torch.is_grad_enabled()):  # type: ignore[attr-defined]
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        own = {hfmodel.storage_key(p) for p in self.parameters()}  # type: ignore[attr-defined]

        def pack(tensor: torch.Tensor):
            if tensor.device.type == "cpu" or tensor.is_meta or hfmodel.storage_key(tensor) in own:
                return tensor
            home = torch.empty_like(tensor, device="cpu", pin_memory=hfmodel.has_values(tensor))
            home.copy_(tensor, non_blocking=True)
            return tensor.device, home

        def unpack(packed):
            return packed if torch.is_tensor(packed) else packed[1].to(packed[0], non_blocking=True)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
