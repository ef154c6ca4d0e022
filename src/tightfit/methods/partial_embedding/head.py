"""Output layers over a reduced vocabulary: the exact split head and the approximate pruned one."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tightfit.core import hfmodel
from tightfit.core.deferred import DeferredHead, HeadRows, HeadSource, Scaling
from tightfit.core.edit import Unchanged
from tightfit.core.edits import Edit, Handle
from tightfit.core.errors import UnsupportedModelError
from tightfit.core.tight import loosen, tighten
from tightfit.core.transform import Slot
from tightfit.methods.partial_embedding.vocabulary import POSITION, Vocabulary
from tightfit.ops.linear_cross_entropy import linear_cross_entropy

_SAMPLE_EVERY = 50
_SAMPLE_TOKENS = 256


class ReducedHead(HeadSource):
    """A head whose parameters hold the kept rows; the dropped ones are frozen (split) or absent (pruned)."""

    def __init__(self, vocabulary: Vocabulary, capped: bool):
        self.vocabulary = vocabulary
        self.capped = capped
        self.losses = 0

    def width(self, head: nn.Module) -> int:
        return self.vocabulary.size

    def rows(self, head: nn.Module) -> HeadRows:
        frozen, frozen_bias = self._dropped(head) if self.vocabulary.head == "split" else (None, None)
        bias = head._parameters.get("bias")
        return HeadRows(head.weight, bias, frozen, frozen_bias, head._buffers[POSITION])  # type: ignore[arg-type]

    def _dropped(self, head: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
        homes = {id(m._parameters.get(a)): c.home for c, m, a in self.vocabulary.tables}
        bias = head._parameters.get("bias")
        frozen_bias = None if bias is None else homes[id(bias)].to(bias)
        return homes[id(head._parameters["weight"])], frozen_bias

    def logits(self, head: nn.Module, hidden: torch.Tensor, stock) -> torch.Tensor:
        kept = stock(hidden)
        position = head._buffers[POSITION]
        assert position is not None
        if self.vocabulary.head == "split":
            frozen, bias = self._dropped(head)
            frozen = frozen.to(kept.device, head.weight.dtype)  # type: ignore[arg-type]
            both = torch.cat([kept, F.linear(hidden, frozen, bias).to(kept.dtype)], dim=-1)
            return both.index_select(-1, position)
        return kept.index_select(-1, position.clamp_min(0))

    def finish(self, head: nn.Module, logits: torch.Tensor) -> torch.Tensor:
        if self.vocabulary.head == "split":
            return logits
        position = head._buffers[POSITION]
        assert position is not None
        return logits.masked_fill(position < 0, float("-inf"))

    def compiled(self, head: nn.Module, hidden: torch.Tensor, stock) -> torch.Tensor:
        if self.capped and self.vocabulary.head == "pruned":
            raise UnsupportedModelError(
                "PartialEmbedding(head='pruned'): this model caps its logits behind the head, which inside a compiled "
                "graph would give dropped tokens a finite logit; use head='split', or do not compile the model"
            )
        return super().compiled(head, hidden, stock)

    def targets(self, head: nn.Module, target: torch.Tensor, ignore_index: int) -> torch.Tensor:
        vocabulary = self.vocabulary
        position = head._buffers[POSITION]
        assert position is not None
        ignored = target == ignore_index
        inside = target.masked_fill(ignored, 0)
        out_of_range = (inside < 0) | (inside >= vocabulary.size)
        if hfmodel.has_values(target):
            if target.device.type != "cpu":
                torch._assert_async((~out_of_range).all(), f"labels must lie in [0, {vocabulary.size})")
            elif bool(out_of_range.any()):
                bad = int(target[out_of_range][0])
                raise IndexError(f"label {bad} is out of range: the vocabulary has {vocabulary.size} ids")
        mapped = position[inside]
        outside = (mapped < 0) if vocabulary.head == "pruned" else (mapped >= len(vocabulary.ids))
        outside = outside & ~ignored
        self._account(head, target, outside)
        return mapped.masked_fill(ignored, ignore_index)

    def _account(self, head: nn.Module, target: torch.Tensor, outside: torch.Tensor) -> None:
        vocabulary = self.vocabulary
        if not hfmodel.has_values(target):
            return
        if vocabulary.head == "pruned":
            if target.device.type == "cpu":
                if bool(outside.any()):
                    raise vocabulary.unknown_error(target[outside], "the labels (head='pruned')")
            else:
                torch._assert_async((~outside).all(), "PartialEmbedding(head='pruned'): a label outside the kept ids")
            return
        if not (head.training and head.weight.requires_grad):  # type: ignore[union-attr]
            return  # no row of the head trains here, so none is left out
        count = outside.sum()
        if vocabulary.outside_labels is None:
            if target.device.type == "cpu" and not int(count):
                return
            vocabulary.outside_labels = torch.zeros_like(count)
            if target.device.type == "cpu":
                warnings.warn(
                    "PartialEmbedding(head='split'): some labels are outside the kept ids; their loss is exact, their "
                    "rows stay frozen (the count is in Applied.report())",
                    stacklevel=2,
                )
        vocabulary.outside_labels += count

    def observe(self, head: nn.Module, hidden: torch.Tensor, target: torch.Tensor, scaling: Scaling) -> None:
        if self.vocabulary.head != "pruned" or not head.training or not hfmodel.has_values(hidden):
            return
        self.losses += 1
        if self.losses % _SAMPLE_EVERY != 1:
            return
        with torch.no_grad():
            # the first tokens of the batch are as good a sample as any: this only feeds the report
            few = hidden[:_SAMPLE_TOKENS]
            frozen, frozen_bias = self._dropped(head)
            bias: torch.Tensor | None = head._parameters.get("bias")
            if scaling.shift is not None:
                shift = scaling.shift.to(few)
                kept_shift = shift[self.vocabulary.ids.to(shift.device)]
                dropped_shift = shift[self.vocabulary.dropped.to(shift.device)]
                bias = kept_shift if bias is None else bias + kept_shift
                frozen_bias = dropped_shift if frozen_bias is None else frozen_bias + dropped_shift
            result: Any = linear_cross_entropy(
                few,
                head.weight,  # type: ignore[arg-type]
                torch.zeros(len(few), dtype=torch.int64, device=few.device),
                bias=bias,
                frozen_weight=frozen,
                frozen_bias=frozen_bias,
                scale=scaling.scale,
                softcap=scaling.cap,
                return_frozen_mass=True,
            )
            self.vocabulary.note_mass(float(result.frozen_mass.mean()))


def _caps_logits(model: nn.Module) -> bool:
    return getattr(hfmodel.text_config(model), "final_logit_softcapping", None) is not None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class HeadEdit(Edit):
    """Compute the loss of a language-model head in chunks, over all rows or over a reduced vocabulary."""

    slot: Slot = Slot.LOSS
    exclusive: bool = True
    module: str
    part: Vocabulary
    reduced: bool

    @property
    def target(self) -> str:
        return self.module

    def run(self, model: nn.Module) -> Handle:
        inner = model.get_submodule(self.module)._modules
        if "base_layer" not in inner and "original_module" not in inner:
            return _HeadHandle(model, self)
        if self.reduced:
            raise UnsupportedModelError(
                f"PartialEmbedding: {self.module} carries an adapter, which gives logits for all rows, and this head "
                f"takes the kept ones alone; use head='full', or leave {self.module} out of the adapters"
            )
        return Unchanged()  # a loss from the head's weight alone would pass the adapter by


class _HeadHandle(Handle):
    def __init__(self, model: nn.Module, edit: HeadEdit):
        self.head = model.get_submodule(edit.module)
        self.reduced = edit.reduced
        source = ReducedHead(edit.part, _caps_logits(model)) if edit.reduced else HeadSource()
        tighten(self.head, DeferredHead, {"source": source})
        if edit.reduced:
            positions = edit.part.positions().to(self.head.weight.device)  # type: ignore[union-attr, arg-type]
            self.head.register_buffer(POSITION, positions, persistent=False)
            edit.part.heads.append(self.head)

    def undo(self, model: nn.Module) -> None:
        if self.reduced:
            del self.head._buffers[POSITION]
            self.head._non_persistent_buffers_set.discard(POSITION)
        loosen(self.head, DeferredHead)
