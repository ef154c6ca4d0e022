"""Trained weights that the Trainer's checkpoints do not give back, in a file beside them.

The Trainer of transformers writes some architectures under older names (ViT) and does not read them again; of a PEFT
model it writes the adapters only. It says nothing about either when a run is resumed.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from tightfit.core import hfmodel
from tightfit.core.artifacts import TENSOR_FILE, replacing, tensor_digest
from tightfit.core.errors import StateError, shorten

FILE = "tightfit_trained.safetensors"


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name; none where they are sharded, as others write these."""
    if hfmodel.refuse_wrapped(model):
        return {}
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def digests(model: nn.Module) -> dict[str, str]:
    """A digest of every parameter that trains."""
    return {name: tensor_digest(parameter) for name, parameter in trained(model).items()}


def add_missing(model: nn.Module, checkpoint: Path) -> None:
    """Write what a checkpoint's own files do not hold under the names that the model has now, where there is such."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    if not checkpoint.is_dir():  # another process writes, or a search for settings has folders of its own
        return
    written: set[str] = set()
    for path in (*checkpoint.glob("*model*.safetensors"), *checkpoint.glob(TENSOR_FILE)):
        with safe_open(path, "pt") as file:
            written.update(file.keys())
    missing = {
        name: parameter.detach().cpu().contiguous()
        for name, parameter in trained(model).items()
        if not any(alias.name in written for alias in hfmodel.aliases(model, parameter))
    }
    if missing:
        with replacing(checkpoint / FILE) as path:
            save_file(missing, path)


def read_missing(model: nn.Module, checkpoint: Path) -> None:
    """Put what `add_missing` wrote back into the model; names or shapes of another model are left alone."""
    from safetensors.torch import load_file

    if not (checkpoint / FILE).is_file():
        return
    own = trained(model)
    with torch.no_grad():
        for name, value in load_file(checkpoint / FILE).items():
            if name in own and own[name].shape == value.shape:
                own[name].copy_(value)


def check(model: nn.Module, saved: dict[str, str], folders: list[Path]) -> None:
    """See that a resumed run begins with the checkpoint's weights, and bring back those that are missing.

    Args:
        saved: `digests` when the checkpoint was written.
        folders: where the checkpoint may be.

    Raises:
        StateError: weights that were trained are not those of the checkpoint.
    """
    for folder in folders:
        if not _changed(model, saved):
            return
        read_missing(model, folder)
    changed = _changed(model, saved)
    if changed:
        raise StateError(
            f"the run was resumed, and {shorten(changed, 3)} have not the values of the checkpoint (the Trainer writes "
            f"some models under other names, and of a PEFT model the adapters only); resume from a checkpoint in the "
            f"run's output_dir, or begin with tightfit.load(model, folder) of what applied.save(folder) wrote"
        )


def _changed(model: nn.Module, saved: dict[str, str]) -> list[str]:
    now = digests(model)
    return sorted(name for name in now if name in saved and now[name] != saved[name])
