"""The mixins: on the model for the tasks' outputs, on the embeddings for their rows, on the backbone for memory."""

from __future__ import annotations

from typing import Any

from tightfit.core.calls import named_call
from tightfit.core.tight import state_of
from tightfit.methods.learnable_memory.memories import OLD, Memories
from tightfit.methods.learnable_memory.records import Shared, slots_of
from tightfit.methods.token_tune.records import KEY


class TaskModel:
    """The model, which gives the logits of a task."""

    def forward(self, *args, **kwargs):
        memories: Memories = state_of(self, TaskModel)["memories"]  # type: ignore[arg-type]
        memories.bind(self)  # type: ignore[arg-type]
        if memories.served == OLD:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        call = named_call(self, args, kwargs)
        return memories.run(self, super().forward, call)  # type: ignore[misc]

    def _stock(self, **call: Any) -> Any:
        return super().forward(**call)  # type: ignore[misc]


class TaskRows:
    """The module that makes the tokens: the tasks' class tokens, while those run."""

    def forward(self, *args, **kwargs):
        rows = state_of(self, TaskRows)["memories"].pending  # type: ignore[arg-type]
        return super().forward(*args, **kwargs) if rows is None else rows  # type: ignore[misc]


class WithMemory:
    """A backbone whose tokens attend to memory too."""

    def forward(self, *args, **kwargs):
        own = state_of(self, WithMemory)  # type: ignore[arg-type]
        slots = slots_of(self, own["blocks"], own["normed"])  # type: ignore[arg-type]
        return super().forward(*args, **{**kwargs, KEY: Shared(slots, own["task"])})  # type: ignore[misc]
