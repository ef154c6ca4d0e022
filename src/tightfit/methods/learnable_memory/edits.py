"""The check of a model on its own weights, and the living side of shared memory."""

from __future__ import annotations

from typing import Any

import torch

from tightfit.core.calls import evaluating, mismatch, random_images
from tightfit.core.edits import Part
from tightfit.core.errors import UnsupportedModelError
from tightfit.methods.learnable_memory.memories import Memories
from tightfit.methods.learnable_memory.places import METHOD, Places
from tightfit.methods.learnable_memory.records import Rows, slots_of


def check(model: Any, memories: Memories) -> None:
    """Compare on a random batch.

    Raises:
        UnsupportedModelError: the logits of the row differ from the stock model's.
    """
    places = memories.places
    embeddings: Any = model.get_submodule(places.embeddings)
    like = embeddings.cls_token
    call = {"pixel_values": random_images(model.config, like)}
    with evaluating(model.modules()), torch.no_grad():
        capture, out = memories._captured(model, type(model)._stock.__get__(model), call)
        record = Rows(slots_of(model, places.blocks, memories.normed), capture, [])
        hidden = memories.hidden_rows(model, like, call, record)
        found = model.get_submodule(places.head)(hidden[:, 0])
    off = mismatch(found, out.logits)
    if off is not None:
        raise UnsupportedModelError(
            f"{METHOD}: {type(model).__name__} is not supported: with its class token apart its logits are {off}, so "
            f"it mixes tokens outside of attention, or does not classify by the class token"
        )


class SharedMemory(Part):
    """The living side of mode "shared"."""

    def __init__(self, tokens: int, places: Places):
        self.tokens, self.places = tokens, places

    def report(self) -> dict[str, Any]:
        return {"memory_parameters": self.places.depth * self.tokens * self.places.width}
