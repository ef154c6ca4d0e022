"""Edits of LearnableMemory: its claim on the blocks' linear layers, and a check on the model's own weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from tightfit.core import hfmodel
from tightfit.core.edits import Claim, Edit, Handle, Part, is_planning
from tightfit.core.errors import UnsupportedModelError
from tightfit.core.transform import Slot
from tightfit.methods.learnable_memory.memories import Memories
from tightfit.methods.learnable_memory.places import METHOD, Places
from tightfit.methods.learnable_memory.records import Rows, slots_of
from tightfit.methods.token_tune.edits import evaluating


class _Nothing(Handle):
    """Nothing to undo."""

    def undo(self, model: nn.Module) -> None:
        pass


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class BlocksEdit(Edit):
    """Says what is expected of the blocks, and changes nothing.

    Exclusive: they run without a graph, and stay as they are (adapters inside would change the old logits). Else
    gradients go through them, so nobody may run them without a graph.
    """

    slot: Slot = Slot.NEW_PARAMETERS
    linears: tuple[str, ...]
    blocks: tuple[str, ...] = ()

    @property
    def target(self) -> str:
        return "(blocks)"

    def claims(self) -> frozenset[Claim]:
        return frozenset(
            {*((self.slot, name) for name in self.linears), *((Slot.BLOCKS, block) for block in self.blocks)}
        )

    def run(self, model: nn.Module) -> Handle:
        return _Nothing()


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class CheckEdit(Edit):
    """Run the old class token apart on a small random batch, and compare it with the stock model's."""

    slot: Slot = Slot.INPUTS
    memories: Memories

    @property
    def target(self) -> str:
        return "(check)"

    def run(self, model: nn.Module) -> Handle:
        if not is_planning() and all(hfmodel.has_values(p) for p in model.parameters()):
            check(model, self.memories)
        return _Nothing()


def check(model: Any, memories: Memories) -> None:
    """Compare on a random batch.

    Raises:
        UnsupportedModelError: the logits of the row differ from the stock model's.
    """
    places = memories.places
    embeddings: Any = model.get_submodule(places.embeddings)
    config, like = model.config, embeddings.cls_token
    side = config.image_size if isinstance(config.image_size, (tuple, list)) else [config.image_size] * 2
    random = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, getattr(config, "num_channels", 3), *side, generator=random).to(like)
    call = {"pixel_values": pixels}
    with evaluating(model), torch.no_grad():
        capture, out = memories._captured(model, type(model)._stock.__get__(model), call)
        record = Rows(slots_of(model, places.blocks, memories.normed), capture, [])
        hidden = memories.hidden_rows(model, like, call, record)
        found = model.get_submodule(places.head)(hidden[:, 0])
    expected = out.logits
    gap, size = (found - expected).abs().amax(), expected.abs().amax().clamp_min(1.0)
    limit = max(100 * torch.finfo(expected.dtype).eps, 1e-5)
    if not bool(gap <= limit * size):
        raise UnsupportedModelError(
            f"{METHOD}: {type(model).__name__} is not supported: with its class token apart its logits are off by "
            f"{float(gap):.1e} (allowed {limit:.0e} of {float(size):.1e}), so it mixes tokens outside of attention, or "
            f"does not classify by the class token"
        )


class SharedMemory(Part):
    """The living side of mode "shared"."""

    def __init__(self, tokens: int, places: Places):
        self.tokens, self.places = tokens, places

    def report(self) -> dict[str, Any]:
        return {"memory_parameters": self.places.depth * self.tokens * self.places.width}
