"""Embedding lookups by original ids into a reduced table, and the guards around the model's call."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from tightfit.core import hfmodel, processes
from tightfit.core.edits import Edit, Handle
from tightfit.core.errors import StateError, UnsupportedModelError
from tightfit.core.tight import loosen, state_of, tighten
from tightfit.core.transform import Slot
from tightfit.methods.partial_embedding.vocabulary import SLOT, Vocabulary, set_lookup_facts


class LookupMixin:
    """Turns original ids into rows of the reduced table, then runs the embedding's own forward (scale and all)."""

    def forward(self, input):
        own = state_of(self, LookupMixin)  # type: ignore[arg-type]
        vocabulary: Vocabulary = own["vocabulary"]
        _refuse_wrapped(self)  # type: ignore[arg-type]
        slots = self._buffers[SLOT]  # type: ignore[attr-defined]
        _check_range(input, vocabulary.size)
        rows = slots[input].to(input.dtype)
        if rows.is_meta or type(rows).__name__ == "FakeTensor":
            return super().forward(rows)  # type: ignore[misc]
        if hfmodel.has_values(rows) and (rows.device.type == "cpu" or vocabulary.fetches):
            unknown = rows < 0
            if bool(unknown.any()):
                return self._fetch(vocabulary, input, rows, unknown)
        else:  # on an accelerator, or compiled: no sync with the host
            torch._assert_async(
                (rows >= 0).all(), "PartialEmbedding: a token id outside the kept vocabulary reached the embedding"
            )
        return super().forward(rows)  # type: ignore[misc]

    def _fetch(self, vocabulary: Vocabulary, input, rows, unknown):
        missing = torch.unique(input[unknown])
        trains = self.training and torch.is_grad_enabled() and self.weight.requires_grad  # type: ignore[attr-defined]
        if not vocabulary.fetches or trains:
            why = " (unknown='fetch' only reads; it cannot train rows)" if vocabulary.unknown == "fetch" else ""
            raise vocabulary.unknown_error(missing, f"the batch{why}")
        codec = next(c for c, m, a in vocabulary.tables if m._parameters.get(a) is self.weight)  # type: ignore[attr-defined]
        at = torch.searchsorted(vocabulary.dropped, missing.cpu())
        fetched = codec.home[at].to(self.weight) * codec.decay  # type: ignore[attr-defined]
        extended = rows.clone()
        extended[unknown] = len(vocabulary.ids) + torch.searchsorted(missing, input[unknown]).to(rows.dtype)
        kept = self._parameters["weight"]  # type: ignore[attr-defined]
        try:
            self._parameters["weight"] = torch.cat([kept, fetched])  # type: ignore[attr-defined]
            return super().forward(extended)  # type: ignore[misc]
        finally:
            self._parameters["weight"] = kept  # type: ignore[attr-defined]


def _refuse_wrapped(module: nn.Module) -> None:
    own = state_of(module, LookupMixin)
    if own["parent"]._modules.get(own["attribute"]) is not module:
        raise UnsupportedModelError(
            f"PartialEmbedding: the token embedding {own['attribute']!r} was wrapped (adapters or trainable copies "
            f"on the embedding itself); they would be given rows of the reduced table. Leave the embedding out of "
            f"the adapter's target modules, or leave PartialEmbedding out of the recipe"
        )


def _check_range(ids: torch.Tensor, size: int) -> None:
    if ids.is_meta or type(ids).__name__ == "FakeTensor":
        return
    if not hfmodel.has_values(ids) or ids.device.type != "cpu":
        torch._assert_async(((ids >= 0) & (ids < size)).all(), f"token ids must lie in [0, {size})")
        return
    if ids.numel() == 0:
        return
    low, high = (int(v) for v in ids.aminmax())
    if low < 0 or high >= size:
        raise IndexError(
            f"token id {low if low < 0 else high} is out of range: the vocabulary has {size} ids (0..{size - 1})"
        )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LookupEdit(Edit):
    """Let one embedding module look up original ids in a reduced table."""

    slot: Slot = Slot.OPERATORS
    module: str
    part: Vocabulary

    @property
    def target(self) -> str:
        return self.module

    def run(self, model: nn.Module) -> Handle:
        return _LookupHandle(model, self)


class _LookupHandle(Handle):
    def __init__(self, model: nn.Module, edit: LookupEdit):
        module: Any = model.get_submodule(edit.module)
        self.module = module
        self.vocabulary = edit.part
        parent, _, attribute = edit.module.rpartition(".")
        self.facts = (module.num_embeddings, module.padding_idx)
        slots = edit.part.slots().to(module.weight.device)
        tighten(
            self.module,
            LookupMixin,
            {"vocabulary": edit.part, "parent": model.get_submodule(parent), "attribute": attribute},
        )
        self.module.register_buffer(SLOT, slots, persistent=False)
        self.module.__dict__["_tight_padding_idx"] = self.module.padding_idx
        set_lookup_facts(self.module, edit.part)
        edit.part.lookups.append(self.module)

    def undo(self, model: nn.Module) -> None:
        del self.module._buffers[SLOT]
        self.module._non_persistent_buffers_set.discard(SLOT)
        del self.module.__dict__["_tight_padding_idx"]
        self.module.num_embeddings, self.module.padding_idx = self.facts
        loosen(self.module, LookupMixin)
        self.vocabulary.unwatch()


class GuardMixin:
    """On the top model: refuses what a reduced vocabulary cannot follow."""

    def resize_token_embeddings(self, *args, **kwargs):
        raise StateError(
            "resize_token_embeddings: the embedding holds a reduced vocabulary (PartialEmbedding); resize before "
            "apply(), or after remove() or merge()"
        )

    def __call__(self, *args, **kwargs):
        vocabulary: Vocabulary = state_of(self, GuardMixin)["vocabulary"]  # type: ignore[arg-type]
        for lookup in vocabulary.lookups:  # a copy made by an adapter cannot notice that it is one
            _refuse_wrapped(lookup)
        # TRL installs a forward on the model, inside of what PEFT has made of it: that reads the head's weight itself
        # and would take its rows for all of them
        forward = hfmodel.without_peft(self).__dict__.get("forward")
        fused = "fused" in getattr(forward, "__qualname__", "").lower() or "fused_lm_head" in kwargs
        if forward is not None and vocabulary.heads and fused:
            raise StateError(
                f"PartialEmbedding(head={vocabulary.head!r}): the trainer replaced this model's forward by a fused "
                f"head that reads lm_head.weight, which holds {len(vocabulary.ids)} of {vocabulary.size} rows; use "
                f"head='full', or switch the trainer's fused loss off"
            )
        return super().__call__(*args, **kwargs)  # type: ignore[misc]


class GeneratesMixin:
    """On a model that generates: a token it has chosen itself is read again, also where no batch may hold it."""

    def generate(self, *args, **kwargs):
        vocabulary: Vocabulary = state_of(self, GeneratesMixin)["vocabulary"]  # type: ignore[arg-type]
        before, vocabulary.generating = vocabulary.generating, True
        try:
            return super().generate(*args, **kwargs)  # type: ignore[misc]
        finally:
            vocabulary.generating = before


class GrowMixin:
    """On the backbone, and on a model that makes ids from labels: takes unknown ids in before the first lookup."""

    def __call__(self, *args, **kwargs):
        vocabulary: Vocabulary = state_of(self, GrowMixin)["vocabulary"]  # type: ignore[arg-type]
        if self.training and torch.is_grad_enabled() and processes.count() > 1:  # type: ignore[attr-defined]
            raise vocabulary.growth_refused()
        given = [*args[:1], *(v for k, v in kwargs.items() if k.endswith("input_ids"))]
        if state_of(self, GrowMixin)["labels"] and torch.is_tensor(kwargs.get("labels")):  # type: ignore[arg-type]
            given.append(kwargs["labels"][kwargs["labels"] != -100])
        ids = [t for t in given if torch.is_tensor(t) and not t.is_floating_point() and hfmodel.has_values(t)]
        if ids:
            flat = torch.cat([t.reshape(-1) for t in ids]).cpu()
            _check_range(flat, vocabulary.size)
            vocabulary.grow(torch.unique(flat))
        return super().__call__(*args, **kwargs)  # type: ignore[misc]
