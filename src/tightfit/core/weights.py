"""Trained weights that the Trainer's checkpoints do not give back, in a file beside them.

The Trainer of transformers writes some architectures under older names (ViT) and does not read them again; of a PEFT
model it writes the adapters only. It says nothing about either when a run is resumed. What a part keeps in the model's
own state dict (rows in host memory) goes the same way as the parameters.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from tightfit.core import hfmodel
from tightfit.core.artifacts import TENSOR_FILE, replacing, tensor_digest
from tightfit.core.edit import load_part_tensors, part_tensors
from tightfit.core.errors import StateError, shorten

if TYPE_CHECKING:
    from tightfit.core.apply import Applied

FILE = "tightfit_trained.safetensors"


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name; none where they are sharded, as others write these."""
    if hfmodel.refuse_wrapped(model):
        return {}
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def held(applied: Applied) -> dict[str, torch.Tensor]:
    """What parts keep in the model's state dict beside its parameters, by part, kind and name."""
    return part_tensors(part for part in applied.parts if part.in_model_state)


def digests(applied: Applied) -> dict[str, str]:
    """A digest of every parameter that trains, and of what parts hold."""
    everything = {**trained(applied.model), **held(applied)}
    return {name: tensor_digest(tensor) for name, tensor in everything.items()}


def add_missing(applied: Applied, checkpoint: Path) -> None:
    """Write what a checkpoint's own files do not hold under the names that the model has now, where there is such."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    if not checkpoint.is_dir():  # another process writes, or a search for settings has folders of its own
        return
    written: set[str] = set()
    for path in (*checkpoint.glob("*model*.safetensors"), *checkpoint.glob(TENSOR_FILE)):
        with safe_open(path, "pt") as file:
            written.update(file.keys())
    model = applied.model
    missing: dict[str, torch.Tensor] = {
        name: parameter
        for name, parameter in trained(model).items()
        if not any(alias.name in written for alias in hfmodel.aliases(model, parameter))
    }
    if missing:  # the files' names are not the model's, so what parts hold is not there either, or not read
        missing |= held(applied)
        with replacing(checkpoint / FILE) as path:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in missing.items()}, path)


def read_missing(applied: Applied, checkpoint: Path) -> None:
    """Put what `add_missing` wrote back into the model; names or shapes of another model are left alone."""
    from safetensors.torch import load_file

    if not (checkpoint / FILE).is_file():
        return
    own, found = trained(applied.model), load_file(checkpoint / FILE)
    with torch.no_grad():
        for name, value in found.items():
            if name in own and own[name].shape == value.shape:
                own[name].copy_(value)
    load_part_tensors((part for part in applied.parts if part.in_model_state), found)


def check(applied: Applied, saved: dict[str, str], folders: list[Path]) -> None:
    """See that a resumed run begins with the checkpoint's weights, and bring back those that are missing.

    Args:
        saved: `digests` when the checkpoint was written.
        folders: where the checkpoint may be.

    Raises:
        StateError: weights that were trained are not those of the checkpoint.
        ArtifactError: the checkpoint's rows are of another shape.
    """
    for folder in folders:
        if not _changed(applied, saved):
            return
        read_missing(applied, folder)
    changed = _changed(applied, saved)
    if changed:
        raise StateError(
            f"the run was resumed, and {shorten(changed, 3)} have not the values of the checkpoint (the Trainer writes "
            f"some models under other names, and of a PEFT model the adapters only); resume from a checkpoint in the "
            f"run's output_dir, or begin with tightfit.load(model, folder) of what applied.save(folder) wrote"
        )


def _changed(applied: Applied, saved: dict[str, str]) -> list[str]:
    now = digests(applied)
    # a parameter may have another name in another recipe; what a part holds may not be there before it is read
    return sorted(name for name, was in saved.items() if now.get(name, was if "/" not in name else "") != was)
