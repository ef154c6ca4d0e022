"""Edits that give modules their fused forms; several methods of a recipe may ask for the same."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from tightfit.core import hfmodel
from tightfit.core.edits import Edit, ModulesEdit, Part
from tightfit.core.errors import SelectorError, shorten
from tightfit.core.marks import Coded, Estimated
from tightfit.core.select import select
from tightfit.methods.operators import modules
from tightfit.methods.operators.modules import Chosen, Found
from tightfit.ops.codec import Codec

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


def operator_edits(model: nn.Module, where: str | None, *, method: str) -> Iterator[Edit]:
    """Edits that fuse the modules that `where` names, save those that another method fuses.

    Raises:
        SelectorError: a pattern matches no module, or none that has a fused form.
    """
    if where is not None:
        select(model, where, method=method)
    chosen = chosen_by(where)
    counts = {kind: len(find(chosen)(model)) for kind, (_, find) in KINDS.items()}
    if not any(counts.values()):
        chosen_ones = "" if where is None else f" that where={where!r} matches"
        raise SelectorError(
            f"{method}: no module of {type(model).__name__}{chosen_ones} has a fused form; "
            f"those that have one are of these kinds: {', '.join(KINDS)}"
        )
    for kind, (mixin, find) in KINDS.items():
        if counts[kind]:
            note = f"{counts[kind]} x {kind}"
            yield ModulesEdit(kind=kind, mixin=mixin, find=find(chosen), note=note, shared=True)
    lora = modules.lora_layers(chosen)
    note = "LoRA layers, where there are any, add in place"
    yield ModulesEdit(kind="lora", mixin=modules.FusedLora, find=lora, note=note, shared=True)
    everywhere = modules.blocks(chosen_by(None))
    if everywhere(model):
        block = modules.FusedBlock
        yield ModulesEdit(kind="block", mixin=block, find=everywhere, note="as one under checkpointing", shared=True)


def coded_edit(kind: str, where: str | None, codec: Codec, note: str) -> Edit:
    """An edit after which the fused modules of a kind keep what they keep by a codec."""
    find = modules.fused(KINDS[kind][0], chosen_by(where), {"codec": codec})
    return ModulesEdit(kind=f"{kind}: {note}", mixin=Coded, find=find, note=note)


def padding_edit(model: nn.Module) -> Iterator[Edit]:
    """An edit after which blocks tell the layers inside them which rows are padding; none without blocks."""
    everywhere = modules.blocks(chosen_by(None), lambda block: {"places": modules.mask_places(block)})
    if everywhere(model):
        note = "tells the padding"
        yield ModulesEdit(kind="block rows", mixin=modules.TellsRows, find=everywhere, note=note, shared=True)


def named_linears(model: nn.Module, where: str, *, method: str) -> list[str]:
    """Stock names of the linear layers that patterns match. Raises: SelectorError."""
    names = select(model, where, kind=hfmodel.is_linear, method=method)
    return [name.removesuffix(".base_layer") for name in names]


def owner_of(name: str) -> str:
    """The stock name of the layer that a layer of an adapter belongs to.

    >>> owner_of("layer.0.query.lora_A.default"), owner_of("layer.0.query.base_layer"), owner_of("layer.0.key")
    ('layer.0.query', 'layer.0.query', 'layer.0.key')
    """
    return name.split(".lora_")[0].removesuffix(".base_layer")


def estimator_edits(
    model: nn.Module,
    targets: Iterable[str],
    state: Callable[[str, nn.Module], dict[str, Any]],
    *,
    method: str,
    part: Part,
    note: str,
    only: Chosen = lambda name: True,
) -> Iterator[Edit]:
    """Edits after which codecs estimate the weight gradients of linear layers, or of their adapters.

    Args:
        targets: stock names of the layers.
        state: from the name and the layer to the state of its `Estimated` mark.
        only: which of these layers, and of their adapters', by the name they have then.

    Raises (when run):
        SelectorError: none of the layers trains under the recipe.
    """
    targets = tuple(target.removesuffix(".base_layer") for target in targets)
    named = frozenset(targets)

    def find(model: nn.Module) -> Found:
        names = {id(module): name for name, module in model.named_modules()}
        found = modules.linears(lambda name: owner_of(name) in named and only(name))(model)
        layers = [m for m, _ in found if trains(m)]
        if not found:
            raise SelectorError(
                f"{method}: its {len(named)} layers ({shorten(sorted(named), 3)}) have a forward of their own (as "
                f"Falcon's), whose weight gradient cannot be estimated; put adapters on them with Lora()"
            )
        if not layers:
            raise SelectorError(
                f"{method}: none of its {len(named)} layers trains under this recipe ({shorten(sorted(named), 3)}); "
                f"name layers that train, or put adapters on these with Lora(where=...)"
            )
        return [(layer, state(names[id(layer)], layer)) for layer in layers]

    fused = modules.linears(lambda name: owner_of(name) in named)
    yield ModulesEdit(kind="linear", mixin=modules.FusedLinear, find=fused, note=f"{len(targets)} modules", shared=True)
    yield ModulesEdit(
        kind="linear: weight gradient",
        mixin=Estimated,
        find=find,
        exclusive=True,
        places=targets,
        part=part,
        note=f"{len(targets)} modules, {note}",
    )


def trains(module: Any) -> bool:
    """Whether a layer's weight takes a gradient now."""
    return bool(module.weight.requires_grad)
