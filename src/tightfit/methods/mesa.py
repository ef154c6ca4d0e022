"""Mesa: what a step keeps for backward, as 8- or 4-bit integers (arXiv 2111.11124)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

from torch import nn

from tightfit.core import hfmodel
from tightfit.core.edits import CallEdit, Edit
from tightfit.core.fields import check_bool, check_choice, check_int, check_selector
from tightfit.core.transform import Context, Slot, Transform
from tightfit.methods.operators import coded_edit, operator_edits
from tightfit.methods.operators.attention import AttentionEdit, supports
from tightfit.methods.operators.modules import NoCache, takes_cache
from tightfit.ops.affine import Affine

MLP = ("activation", "gated mlp")
CODED = ("linear", "layer norm", "rms norm", *MLP)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesa(Transform):
    """Keep activations for backward as 8-bit (or 4-bit) integers; the forward stays exact.

    A norm keeps the code of its normalised rows, which the linear layers behind it read too; an activation or a gated
    MLP keeps the code of what goes into it; a linear layer whose input nobody else keeps, that input's code. About a
    quarter of float32's bytes (an eighth with 4 bits) and gradients off by about 1 % (10 %). Best together with
    `FusedOps`, which also keeps the attention's tensors once and chunks a language model's loss.

    Fields:
        bits: 8 or 4.
        group_size: channels of a token that share a range.
        rounding: "nearest", or "stochastic", which is unbiased and several times slower on a CPU. It draws random
            numbers in the forward, so that dropout drops others than in the stock step of the same seed.
        attention: q, k and v in code too; the attention is then recomputed in backward as under `FusedOps`.
        mlp_bits: bits of what activations and gated MLPs keep; None: as `bits`.
        where: patterns of module names (`|` between them); None: all. With patterns the attention stays as it is.

    Raises:
        TypeError, ValueError: a field out of range; `attention` together with `where`.
        SelectorError: `where` matches nothing that keeps anything (when planned or applied).

    Example:
        >>> import tightfit
        >>> tightfit.chain(tightfit.FusedOps(), tightfit.Mesa(mlp_bits=4))
        chain(FusedOps(), Mesa(mlp_bits=4))

    Source: arXiv 2111.11124, sections 3 and 4. Deviations: groups of channels of one token instead of heads over the
    batch, so no range can go stale; nearest rounding by default; the normalised rows are stored instead of a norm's
    input, once for all their users; matrix products of attention are recomputed, not stored.
    """

    bits: int = 8
    group_size: int = 128
    rounding: str = "nearest"
    attention: bool = False
    mlp_bits: int | None = None
    where: str | None = None

    name: ClassVar[str] = "mesa"
    paper: ClassVar[str] = "2111.11124"
    touches: ClassVar[frozenset[Slot]] = frozenset({Slot.OPERATORS, Slot.INPUTS})
    exact: ClassVar[bool] = False
    reversible: ClassVar[bool] = True
    summary: ClassVar[str] = "saved activations as 8- or 4-bit integers"

    def __post_init__(self) -> None:
        check_choice(self, "bits", (8, 4))
        if self.mlp_bits is not None:
            check_choice(self, "mlp_bits", (8, 4))
        check_int(self, "group_size", 2)
        check_choice(self, "rounding", ("nearest", "stochastic"))
        check_bool(self, "attention")
        check_selector(self, "where", optional=True)
        if self.attention and self.where is not None:
            raise ValueError(
                f"Mesa: attention=True encodes q, k and v of the whole model, so it takes no where={self.where!r}; "
                f"drop one of the two"
            )

    @classmethod
    def candidates(cls, model: nn.Module) -> Iterator[Mesa]:
        yield cls()
        yield cls(attention=True)

    def edits(self, model: nn.Module, context: Context) -> Iterator[Edit]:
        yield from operator_edits(model, self.where, method="Mesa")
        for kind in CODED:
            codec = self._codec(self.mlp_bits if kind in MLP else None)
            yield coded_edit(kind, self.where, codec, f"{codec.bits} bits")
        if self.attention and supports(model):
            label = f"_{self.bits}_{self.group_size}_{self.rounding}"
            yield AttentionEdit(codec=self._codec(None), label=label, note=f"keeps q, k and v in {self.bits} bits")
            if takes_cache(hfmodel.backbone(model)[1]):
                yield CallEdit(mixin=NoCache, note="no generation cache in training")

    def _codec(self, bits: int | None) -> Affine:
        return Affine(self.bits if bits is None else bits, self.group_size, self.rounding)
