"""The methods under the battery: a method is one row."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import models
from checks.transforms import CountCalls, HalfTable, OwnLinear, SwapTokens, Tape

from tightfit import (
    Checkpointing,
    FusedOps,
    LadderSide,
    LearnableMemory,
    Lora,
    Losa,
    Mesa,
    PartialEmbedding,
    RecurrentMemory,
    Reversible,
    Sherl,
    SparseAdapter,
    TokenTune,
    TokenTuringMachine,
    Velora,
    WtaCrs,
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One method with what the battery may expect of it.

    Attributes:
        make: model -> recipe or transform.
        keeps_names: stock parameters keep their names while it is applied.
        exact: gradients are those of the stock step. A set names the families it is exact on.
        exports: a stock checkpoint can hold its result.
        merges_equal: the merged model gives the logits of the applied one (up to rounding).
        deterministic: it draws no random numbers, so a step can be repeated.
        recomputes_equal: its gradients are the same under checkpointing. Where they are not, a block estimates with
            what it is given itself instead of what is kept outside of it.
    """

    name: str
    make: Callable[[Any], Any]
    keeps_names: bool = True
    exact: bool | frozenset[str] = True
    merges_equal: bool = True
    deterministic: bool = True
    recomputes_equal: bool = True
    exports: bool = True
    families: tuple[str, ...] = ("bert", "llama", "t5")

    def is_exact(self, family: str) -> bool:
        return self.exact if isinstance(self.exact, bool) else family in self.exact


def _partial(**fields):
    return lambda model: PartialEmbedding(ids=models.kept_ids(model), force=True, **fields)


def _dora(model):
    return Lora(config={"peft_type": "LORA", "r": 2, "use_dora": True, "target_modules": "all-linear"})


def _meft1(model):
    return Reversible(variant="meft1", adapter_dim=4, merge="mean")


def _side(name, make):
    return Row(name, make, keeps_names=False, exact=False, exports=False)


def _sparse(name, **fields):
    make = lambda model: SparseAdapter(width=96, top_k=8, **fields)  # noqa: E731
    return Row(name, make, keeps_names=False, exact=False, exports=False)


def _recurrent(name, **fields):
    make = lambda model: RecurrentMemory(tokens=2, segment=4, **fields)  # noqa: E731
    return Row(name, make, keeps_names=False, exact=False, exports=False, families=("llama", "bert"))


def _memory(name, **fields):
    make = lambda model: LearnableMemory(tokens=2, **fields)  # noqa: E731
    return Row(name, make, keeps_names=False, exact=False, exports=False, families=("vit",))


def _turing(name, **fields):
    make = lambda model: TokenTuringMachine(tokens=2, memory=3, segment=3, layers=1, mlp=16, **fields)  # noqa: E731
    return Row(name, make, keeps_names=False, exact=False, exports=False, families=("bert", "vit"))


ENCODERS = frozenset({"bert"})


def _tokens(name, **fields):
    return Row(name, lambda model: TokenTune(**fields), exact=False, deterministic=False, families=("bert", "llama"))


ROWS = [
    Row("lora", lambda model: Lora(rank=2), keeps_names=False, exact=False),
    Row("dora", _dora, keeps_names=False, exact=False),
    Row("checkpointing", lambda model: Checkpointing()),
    Row("checkpointing-offload", lambda model: Checkpointing(offload=True)),
    Row("fused-ops", lambda model: FusedOps()),
    Row("partial-embedding", _partial()),
    Row("partial-embedding-split", _partial(head="split"), exact=ENCODERS),
    Row("partial-embedding-pruned", _partial(head="pruned"), exact=ENCODERS, merges_equal=False),
    Row("partial-embedding-grow", _partial(unknown="grow")),
    Row("half-table", lambda model: HalfTable(), exact=False, merges_equal=False),
    Row("own-linear", lambda model: OwnLinear()),
    Row("tape", lambda model: Tape()),
    Row("count-calls", lambda model: CountCalls()),
    Row("swap-tokens", lambda model: SwapTokens(), exact=False, deterministic=False),
    Row("mesa", lambda model: Mesa(), exact=False, recomputes_equal=False),
    Row("wta-crs", lambda model: WtaCrs(min_rows=4), exact=False, deterministic=False, recomputes_equal=False),
    Row("mesa-attention", lambda model: Mesa(attention=True, bits=4), exact=False, recomputes_equal=False),
    Row("reversible", lambda model: Reversible(), exact=False, merges_equal=False),
    Row("reversible-meft1", _meft1, keeps_names=False, exact=False, exports=False),
    _side("ladder-side", lambda model: LadderSide()),
    _side("ladder-side-published", lambda model: LadderSide(reduction=4, projection="linear", merge="side")),
    _side("sherl", lambda model: Sherl(reduction=4, late_layers=0)),
    _side("losa", lambda model: Losa(rank=4)),
    _sparse("sparse-adapter"),
    _sparse("sparse-adapter-grouped", groups=8, probe=4, gate="sigmoid", retain="refetch", store="disk"),
    _recurrent("recurrent-memory"),
    _recurrent("recurrent-memory-block", bptt="block:1", align="left"),
    Row("velora", lambda model: Velora(groups=8), exact=False),
    _tokens("token-tune", ratio=0.5),
    _tokens("token-tune-count", count=4, policy="labelled", normalise="all"),
    _tokens("token-tune-block", ratio=0.4, policy="block", schedule="block"),
    _turing("token-turing-machine"),
    _turing("token-turing-machine-open", freeze=False, unit="simplified", pool="last"),
    _memory("learnable-memory"),
    _memory("learnable-memory-shared", mode="shared"),
]

FAMILIES = ("bert", "llama", "t5")
NO_IMAGES = ("partial-embedding", "half-table", "swap-tokens", "recurrent-memory", "token-tune-block")
"""Beginnings of the names of rows that only work on tokens."""


def meeting(first: Row, second: Row) -> str | None:
    """The family on which two rows are tried together."""
    both = [family for family in ("llama", *first.families) if family in first.families and family in second.families]
    images = [row for row in (first, second) if "vit" in row.families]
    others = [row for row in (first, second) if "vit" not in row.families]
    if not both and images and not others[0].name.startswith(NO_IMAGES):
        return "vit"
    return both[0] if both else None
