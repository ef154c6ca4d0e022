"""The mixins of TokenTuringMachine: the backbone's tokens are noted, and the model gives the stream's logits."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tightfit.core.calls import hidden_states, named_call
from tightfit.core.edits import Part
from tightfit.core.errors import ConflictError, StateError, shorten
from tightfit.core.tight import state_of
from tightfit.methods.heads import answered, frozen
from tightfit.methods.token_turing_machine.stream import TokenTuringStream

STREAM = "tight_stream"
"""Name of the module that is added."""


class StreamHead(nn.Module):
    """A stream over an encoder's tokens, and a head on the mean of what it emits."""

    def __init__(self, stream: TokenTuringStream, segment: int, labels: int, pool: str):
        super().__init__()
        self.stream, self.segment, self.pool = stream, segment, pool
        self.head = nn.Linear(stream.width, labels)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """(B, labels) of tokens (B, L, d), of which mask (B, L) bool says the real ones."""
        rest = -hidden.shape[1] % self.segment
        tokens = F.pad(hidden.to(self.head.weight.dtype), (0, 0, 0, rest)).unflatten(1, (-1, self.segment))
        real = F.pad(mask, (0, rest), value=False).unflatten(1, (-1, self.segment))
        outputs, _ = self.stream(tokens, mask=real)
        means, alive = outputs.mean(2), real.any(2)  # (B, T, d), (B, T)
        if self.pool == "mean":
            # sets without tokens give zeros
            pooled = means.sum(1) / alive.sum(1, keepdim=True).clamp_min(1).to(means.dtype)
        else:
            places = torch.arange(alive.shape[1], device=alive.device)
            last = (alive * places).amax(1)
            pooled = means.gather(1, last[:, None, None].expand(-1, 1, means.shape[-1])).squeeze(1)
        return self.head(pooled)


class Reading(Part):
    """The living side of an applied `TokenTuringMachine`."""

    def __init__(self, freeze: bool, labels: int):
        self.freeze, self.labels = freeze, labels
        self.noting = False
        self.seen: tuple[Tensor, Tensor | None] | None = None
        self.steps: int | None = None

    def __deepcopy__(self, memo: dict) -> Reading:
        twin = memo[id(self)] = Reading(self.freeze, self.labels)
        return twin

    def report(self) -> dict[str, Any]:
        return {} if self.steps is None else {"steps": self.steps}

    def run(self, model: Any, stock: Any, call: dict[str, Any]) -> Any:
        """The model's output with the stream's logits."""
        labels = call.pop("labels", None)
        if self.freeze and model.training and torch.is_grad_enabled():
            trained = [n for n, p in model.named_parameters() if p.requires_grad and STREAM not in n.split(".")]
            if trained:
                raise ConflictError(
                    f"TokenTuringMachine: the encoder runs without a graph, so {shorten(trained, 5)} would never get a "
                    f"gradient; set requires_grad to False there, or take freeze=False"
                )
        self.noting, self.seen = True, None
        try:
            with frozen(model) if self.freeze else contextlib.nullcontext():
                out = stock(**call)
            if self.seen is None:
                raise StateError("TokenTuringMachine: the model gave an output without calling its backbone")
            hidden, mask = self.seen
        finally:
            self.noting, self.seen = False, None
        real = hidden.new_ones(hidden.shape[:2], dtype=torch.bool)
        if mask is not None and mask.shape == hidden.shape[:2]:
            real = mask.bool()
        head: StreamHead = model._modules[STREAM]
        self.steps = -(-hidden.shape[1] // head.segment)
        logits = head(hidden, real)
        return answered(model, out, logits, call, labels, self.labels)


class StreamModel:
    """The model, which gives the stream's logits."""

    def forward(self, *args, **kwargs):
        reading: Reading = state_of(self, StreamModel)["reading"]  # type: ignore[arg-type]
        call = named_call(self, args, kwargs)
        return reading.run(self, super().forward, call)  # type: ignore[misc]


class Noted:
    """The backbone, whose tokens and mask are noted during a call of the model."""

    def __call__(self, *args, **kwargs):
        out = super().__call__(*args, **kwargs)  # type: ignore[misc]
        reading: Reading = state_of(self, Noted)["reading"]  # type: ignore[arg-type]
        if reading.noting:
            call = named_call(self, args, kwargs)
            reading.seen = hidden_states(out), call.get("attention_mask")
        return out
