"""Edits that give modules their fused forms; several methods of a recipe may ask for the same."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from tightfit.core.edits import Edit, ModulesEdit
from tightfit.core.errors import SelectorError
from tightfit.core.select import select
from tightfit.methods.operators import modules
from tightfit.methods.operators.modules import Chosen, Found

State = Callable[[nn.Module], dict[str, Any]]

KINDS = {
    "linear": (modules.FusedLinear, modules.linears),
    "layer norm": (modules.FusedLayerNorm, modules.layer_norms),
    "rms norm": (modules.FusedRMSNorm, modules.rms_norms),
    "activation": (modules.FusedActivation, modules.activations),
    "gated mlp": (modules.FusedGate, modules.gates),
    "dropout": (modules.FusedDropout, modules.dropouts),
}


def chosen_by(where: str | None) -> Chosen:
    """Whether patterns written for the stock model match a module's name, also below adapters.

    >>> chosen_by("query|*.value")("layer.0.query.base_layer")
    True
    """
    if where is None:
        return lambda name: True
    patterns = [part.strip() for part in where.split("|")]

    def chosen(name: str) -> bool:
        name = name.replace(".base_layer", "")
        return any(fnmatch.fnmatchcase(name, p) or fnmatch.fnmatchcase(name, f"*.{p}") for p in patterns)

    return chosen


def found(model: nn.Module, chosen: Chosen, kinds: Iterable[str]) -> dict[str, Found]:
    """The modules of each kind, with the state of their fused form."""
    return {kind: KINDS[kind][1](chosen)(model) for kind in kinds}


def operator_edits(
    model: nn.Module, where: str | None, kinds: Iterable[str] = tuple(KINDS), *, method: str
) -> Iterator[Edit]:
    """Edits that fuse the modules of these kinds that `where` names, save those that another method fuses.

    Raises:
        SelectorError: a pattern matches no module, or none that has a fused form.
    """
    if where is not None:
        select(model, where, method=method)
    chosen, kinds = chosen_by(where), tuple(kinds)
    counts = {kind: len(modules_) for kind, modules_ in found(model, chosen, kinds).items()}
    if not any(counts.values()):
        chosen_ones = "" if where is None else f" that where={where!r} matches"
        raise SelectorError(
            f"{method}: no module of {type(model).__name__}{chosen_ones} has a fused form; "
            f"those that have one are of these kinds: {', '.join(kinds)}"
        )
    for kind in kinds:
        mixin, find = KINDS[kind]
        if counts[kind]:
            note = f"{counts[kind]} modules"
            yield ModulesEdit(kind=kind, mixin=mixin, find=find(chosen), note=note, shared=True)
    if "linear" in kinds:
        lora = modules.lora_layers(chosen)
        yield ModulesEdit(
            kind="lora",
            mixin=modules.FusedLora,
            find=lora,
            note="LoRA layers, where there are any, add in place",
            shared=True,
        )
    everywhere = modules.blocks(chosen_by(None))
    if everywhere(model):
        block = modules.FusedBlock
        yield ModulesEdit(kind="block", mixin=block, find=everywhere, note="as one under checkpointing", shared=True)


def mark_edit(kind: str, where: str | None, mark: type, state: State, note: str, **options: Any) -> Edit:
    """An edit that puts a mark on the fused modules of a kind: what they keep, they keep by the codec in its state."""
    find = modules.fused(KINDS[kind][0], chosen_by(where), state)
    return ModulesEdit(kind=f"{kind}: {note}", mixin=mark, find=find, note=note, **options)
