"""FusedOps: the operators of a step keep each tensor once, and rebuild what can be rebuilt."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

from torch import nn

from tightfit.core import hfmodel
from tightfit.core.deferred import DeferredHead, HeadSource
from tightfit.core.edit import Unchanged
from tightfit.core.edits import Edit, Handle
from tightfit.core.fields import check_bool, check_selector
from tightfit.core.tight import is_tight, loosen, tighten
from tightfit.core.transform import Context, Slot, Transform
from tightfit.methods.operators import operator_edits
from tightfit.methods.operators.attention import AttentionEdit, supports


@dataclasses.dataclass(frozen=True, kw_only=True)
class FusedOps(Transform):
    """Exact gradients from fewer kept tensors: every operator keeps its input, and nobody keeps what can be rebuilt.

    A norm keeps its input; the linear layers behind it rebuild their input from that. An activation or a gated MLP
    keeps what goes into it; the layer behind rebuilds the product. Attention keeps q, k and v; its probabilities and
    its output are made again in backward, once for both. Dropout keeps a bit per element. The loss of a language
    model is computed in chunks. Outputs are bit-equal to stock, gradients equal up to rounding. What has no fused
    form stays as it is.

    Fields:
        where: patterns of module names (`|` between them) that are fused; None: all. With patterns the attention
            stays stock.
        loss: compute the loss of a language-model head in chunks, without tokens x vocabulary logits.

    Raises:
        TypeError, ValueError: a field of the wrong type, an empty pattern.
        SelectorError: `where` matches nothing that has a fused form (when planned or applied).

    Example:
        >>> import tightfit
        >>> tightfit.chain(tightfit.FusedOps(loss=False))
        chain(FusedOps(loss=False))

    Source: the exact tier that activation-compressed training starts from (arXiv 2111.11124 section 3, arXiv
    2305.15265 section 2.1); who keeps which tensor is decided as the model runs, by `tightfit.ops.source`.
    """

    where: str | None = None
    loss: bool = True

    name: ClassVar[str] = "fused-ops"
    paper: ClassVar[str] = ""
    touches: ClassVar[frozenset[Slot]] = frozenset({Slot.OPERATORS, Slot.LOSS})
    exact: ClassVar[bool] = True
    reversible: ClassVar[bool] = True
    summary: ClassVar[str] = "same gradients from fewer kept tensors; chunked loss"

    def __post_init__(self) -> None:
        check_selector(self, "where", optional=True)
        check_bool(self, "loss")

    @classmethod
    def candidates(cls, model: nn.Module) -> Iterator[FusedOps]:
        yield cls()

    def edits(self, model: nn.Module, context: Context) -> Iterator[Edit]:
        yield from operator_edits(model, self.where, method="FusedOps")
        if self.where is None and supports(model):
            yield AttentionEdit(note="keeps q, k and v")
        if self.loss and hfmodel.has_lm_head(model):
            yield LossEdit(note="chunked loss")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LossEdit(Edit):
    """Chunk the loss of the language-model head, unless another method of the recipe does so already."""

    slot: Slot = Slot.LOSS

    @property
    def target(self) -> str:
        return "(head)"

    def run(self, model: nn.Module) -> Handle:
        head: Any = model.get_output_embeddings()  # type: ignore[operator]
        # an adapter makes logits of its own, which the head's rows alone do not tell
        return Unchanged() if hfmodel.is_adapter(head) else _LossHandle(head)


class _LossHandle(Handle):
    def __init__(self, head: nn.Module):
        self.head: nn.Module | None = None
        if isinstance(head, nn.Linear) and not is_tight(head, DeferredHead):
            tighten(head, DeferredHead, {"source": HeadSource()})
            self.head = head

    def undo(self, model: nn.Module) -> None:
        if self.head is not None:
            loosen(self.head, DeferredHead)
