"""Checkpoints of a run: everything a run needs to go on to the same bits, without a pickle.

A checkpoint is a folder `checkpoint-<step>`:

    recipe.json, tightfit.safetensors   the recipe and what it trained (`Applied.save`)
    optimizer.safetensors               tensors of the optimizer's state
    state.json                          the rest of it, scheduler, gradient scaler, random states
    parts.safetensors                   optimizer state that methods hold themselves, where there is some
    process-<n>.safetensors             what methods keep in process n, where it is not what they keep in process 0
    trainer_state.json                  the Trainer's own state
    complete.json                       the files, their sizes and digests, written last

It is written under another name, synced and renamed, so a run killed at any moment leaves whole checkpoints
only; `complete.json` guards against what happens to a folder afterwards.
"""

from __future__ import annotations

import base64
import contextlib
import json
import random
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tightfit.core.artifacts import file_digest, replacing, replacing_folder, write_text
from tightfit.core.errors import ArtifactError, RecipeError, StateError, TightfitError
from tightfit.train.failures import is_no_space, no_space

if TYPE_CHECKING:
    from transformers.trainer_callback import TrainerState

    from tightfit.core.apply import Applied

FORMAT = 1
OPTIMIZER_FILE = "optimizer.safetensors"
PARTS_FILE = "parts.safetensors"
STATE_FILE = "state.json"
TRAINER_FILE = "trainer_state.json"
COMPLETE_FILE = "complete.json"
KEPT = 2
_NAME = re.compile(r"checkpoint-(\d+)")


def write_checkpoint(
    folder: Path,
    applied: Applied,
    *,
    step: int,
    trainer_state: Any,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    scaler: Any = None,
    random_states: list[dict[str, Any]],
    kept: Sequence[dict[str, torch.Tensor]] = (),
    skipped: int = 0,
) -> Path:
    """Write `checkpoint-<step>` into `folder`, all or nothing; a damaged one of the same step is replaced.

    Args:
        trainer_state: a `transformers.TrainerState`.
        random_states: `random_state()` of every process, in the order of their ranks.
        kept: `Applied.state_dict()` of every process, in the same order; none where there is one process.
        skipped: batches left out in a row before this step's end.

    Raises:
        TrainingError: there is no space for it; names the bytes. Earlier checkpoints are as they were.
        OSError: it could not be written for another reason.
        StateError: the optimizer or scheduler keeps something that cannot be written without a pickle.
    """
    path = folder / f"checkpoint-{step}"
    if is_complete(path):
        return path
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(path, ignore_errors=True)
    tensors, rest = split_state(optimizer.state_dict())
    document = {
        "tightfit_checkpoint": FORMAT,
        "step": step,
        "optimizer": rest,
        "scheduler": scheduler.state_dict(),
        "scaler": scaler.state_dict() if scaler is not None else None,
        "random": random_states,
        "skipped": skipped,
    }
    try:
        text = json.dumps(document)
    except TypeError as error:
        raise StateError(f"checkpoint of step {step}: optimizer or scheduler cannot be saved: {error}") from error
    files = {OPTIMIZER_FILE: tensors}
    if held := _part_tensors(applied):
        files[PARTS_FILE] = held
    for rank, own in enumerate(kept):
        if not _same(own, kept[0]):
            files[_process_file(rank)] = {key: tensor.contiguous() for key, tensor in own.items()}
    try:
        _write(path, applied, files, text, trainer_state)
    except Exception as error:
        if not is_no_space(error):
            raise
        needed = own_bytes(applied) + sum(t.nbytes for held in files.values() for t in held.values()) + len(text)
        raise no_space(folder, f"the checkpoint of step {step}", needed) from error
    return path


def own_bytes(applied: Applied) -> int:
    """Bytes of what `Applied.save` writes, but for headers."""
    trained = [p for p in applied.model.parameters() if p.requires_grad]
    parts = [tensor for part in applied.parts for tensor in part.tensors().values()]
    return sum(tensor.nbytes for tensor in (*trained, *applied.model.buffers(), *parts))


def _write(
    path: Path, applied: Applied, files: dict[str, dict[str, torch.Tensor]], text: str, trainer_state: Any
) -> None:
    from safetensors.torch import save_file

    with replacing_folder(path) as temporary:
        applied.save(temporary)
        for name, tensors in files.items():
            with replacing(temporary / name) as file:
                save_file(tensors, file)
        write_text(temporary / STATE_FILE, text)
        trainer_state.save_to_json(str(temporary / TRAINER_FILE))
        written = sorted(temporary.iterdir())
        sizes = {file.name: file.stat().st_size for file in written}
        digests = {file.name: file_digest(file) for file in written}
        write_text(temporary / COMPLETE_FILE, json.dumps({"files": sizes, "sha256": digests}))


def is_complete(path: Path) -> bool:
    """Whether all files of a checkpoint are there in their full size."""
    try:
        sizes = json.loads((path / COMPLETE_FILE).read_text(encoding="utf-8"))["files"]
        return bool(sizes) and all((path / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def check_unchanged(path: Path) -> None:
    """See that the files of a complete checkpoint hold what was written. Raises: ArtifactError."""
    with intact(path):
        for name, digest in json.loads((path / COMPLETE_FILE).read_text(encoding="utf-8"))["sha256"].items():
            if file_digest(path / name) != digest:
                raise ValueError(f"{name} holds other bytes than were written")


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first."""
    found = [(int(m[1]), p) for p in folder.glob("checkpoint-*") if (m := _NAME.fullmatch(p.name))]
    return [path for _, path in sorted(found) if is_complete(path)]


def drop_old(folder: Path, kept: int = KEPT) -> None:
    """Remove all but the newest complete checkpoints; one that is removed is never seen half there."""
    for path in checkpoints(folder)[:-kept]:
        going = path.with_name(f".{path.name}.old")
        shutil.rmtree(going, ignore_errors=True)
        path.rename(going)
        shutil.rmtree(going, ignore_errors=True)


def drop_leftovers(folder: Path) -> None:
    """Remove what a killed process left half written."""
    for path in folder.glob(".checkpoint-*"):
        shutil.rmtree(path, ignore_errors=True)


def read_state(path: Path) -> dict[str, Any]:
    """A checkpoint's `state.json`. Raises: ArtifactError when it is damaged."""
    file = path / STATE_FILE
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{file}: cannot be read ({error}); the checkpoint is damaged") from None
    if not isinstance(document, dict) or document.get("tightfit_checkpoint") != FORMAT:
        raise ArtifactError(f"{file}: is not a checkpoint of format {FORMAT}")
    return document


@contextlib.contextmanager
def intact(path: Path) -> Iterator[None]:
    """Whatever goes wrong inside, of files that are not what `write_checkpoint` wrote, as one `ArtifactError`."""
    try:
        yield
    except TightfitError:
        raise
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ArtifactError(
            f"{path}: the checkpoint is damaged or was changed ({said}); remove that folder to go on from the one "
            f"before it"
        ) from error


def restore(path: Path, applied: Applied, optimizer: torch.optim.Optimizer, scheduler: Any, process: int = 0) -> int:
    """Put a checkpoint's state into a fresh optimizer and scheduler over the same parameters, and into the recipe.

    Args:
        process: the number of this one.

    Returns:
        Batches left out in a row before the checkpoint's step ended.

    Raises:
        ArtifactError: the checkpoint is damaged, or belongs to another recipe.
    """
    with intact(path):
        state = read_state(path)
        _load_optimizer(path, state["optimizer"], optimizer)
        _load_parts(path, applied, process)
        _refuse_other("scheduler", state["scheduler"], scheduler.state_dict())
        scheduler.load_state_dict(state["scheduler"])
        return int(state.get("skipped", 0))


def restore_scaler(path: Path, scaler: Any) -> None:
    """Put a checkpoint's gradient scaler back, where it has one. Raises: ArtifactError."""
    with intact(path):
        found = read_state(path)["scaler"]
        if found is not None:
            _refuse_other("scaler", found, scaler.state_dict())
            scaler.load_state_dict(found)


def restore_random(path: Path, process: int, processes: int) -> None:
    """Put a process's random states back. Raises: ArtifactError; RecipeError where others wrote the checkpoint."""
    with intact(path):
        states = read_state(path)["random"]
        if len(states) != processes:
            raise RecipeError(
                f"{path}: was written by {len(states)} processes, this run has {processes}; resume with as many"
            )
        set_random_state(states[process])


def trainer_state(path: Path) -> TrainerState:
    """The Trainer's state in a checkpoint. Raises: ArtifactError."""
    from transformers.trainer_callback import TrainerState

    with intact(path):
        state = TrainerState.load_from_json(str(path / TRAINER_FILE))
        _refuse_other(TRAINER_FILE, _scalars(state), _scalars(TrainerState()) | {"epoch": 0.0})
        if f"checkpoint-{state.global_step}" != path.name or not 0 <= state.global_step <= state.max_steps:
            raise ValueError(f"{TRAINER_FILE} says step {state.global_step} of {state.max_steps}")
        held = state.stateful_callbacks
        if not (isinstance(held, dict) and all(isinstance(entry, dict) for entry in state.log_history)):
            raise ValueError(f"log_history or stateful_callbacks of {TRAINER_FILE} hold what they cannot")
        return state


def _scalars(state: TrainerState) -> dict[str, Any]:
    names = ("epoch", "global_step", "max_steps", "num_train_epochs", "log_history")
    return {name: getattr(state, name) for name in names}


def _refuse_other(name: str, found: Any, fresh: Any) -> None:
    """Values may differ; the keys of dictionaries and the kinds of values may not."""
    if isinstance(fresh, dict):
        if not isinstance(found, dict) or found.keys() != fresh.keys():
            raise ValueError(f"{name} has other entries")
        for key, value in fresh.items():
            _refuse_other(f"{name}.{key}", found[key], value)
    elif name.endswith(".params"):  # the optimizer itself compares those
        return
    elif _kind(found) is _kind(fresh) is list and fresh:
        _refuse_other(name, dict(enumerate(found)), dict(enumerate(fresh)))
    elif _kind(found) is not _kind(fresh):
        raise ValueError(f"{name} is {repr(found)[:40]}")


def _kind(value: Any) -> type:
    """The type that a value has in JSON, one for all numbers."""
    kinds: dict[type, type] = {int: float, tuple: list}
    return kinds.get(type(value), type(value))


def _load_optimizer(path: Path, rest: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    from safetensors.torch import load_file

    groups = optimizer.state_dict()["param_groups"]
    state = join_state(load_file(path / OPTIMIZER_FILE), rest)
    for number, (group, fresh) in enumerate(zip(state["param_groups"], groups)):
        _refuse_other(f"param_groups.{number}", group, fresh)
        for key, value in fresh.items():
            if isinstance(value, tuple):
                group[key] = tuple(group[key])
    try:
        optimizer.load_state_dict(state)
    except ValueError as error:
        raise ArtifactError(f"{path}: the optimizer state belongs to another recipe: {error}") from None


def _load_parts(path: Path, applied: Applied, process: int) -> None:
    from safetensors.torch import load_file

    file = path / PARTS_FILE
    found = load_file(file) if file.exists() else {}
    for part in applied.parts:
        prefix = f"{type(part).__name__}/"
        held = {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)}
        if held:
            part.load_training_tensors(held)
    if (path / _process_file(process)).exists():
        applied.load_state_dict(load_file(path / _process_file(process)))


def _process_file(process: int) -> str:
    return f"process-{process}.safetensors"


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def _part_tensors(applied: Applied) -> dict[str, torch.Tensor]:
    return {
        f"{type(part).__name__}/{key}": tensor.detach().cpu().contiguous()
        for part in applied.parts
        for key, tensor in part.training_tensors().items()
    }


def split_state(state: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """An optimizer's state dict as tensors by name and the rest as JSON values.

    >>> tensors, rest = split_state({"state": {0: {"step": torch.tensor(3.0), "k": 1}}, "param_groups": []})
    >>> list(tensors), rest["state"]
    (['0.step'], {'0': {'k': 1}})
    """
    tensors: dict[str, torch.Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        plain[str(index)] = {}
        for key, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{key}"] = value.detach().to("cpu", copy=True).contiguous()
            else:
                plain[str(index)][key] = value
    return tensors, {"state": plain, "param_groups": state["param_groups"], "tensors": list(tensors)}


def join_state(tensors: dict[str, torch.Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `split_state`. Raises: ValueError: other tensors than it gave."""
    if set(tensors) != set(rest["tensors"]):
        raise ValueError("the optimizer's tensors have other names than were written")
    state: dict[int, dict[str, Any]] = {int(i): dict(entries) for i, entries in rest["state"].items()}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        state[int(index)][key] = tensor
    return {"state": state, "param_groups": [dict(group) for group in rest["param_groups"]]}


def random_state() -> dict[str, Any]:
    """The random states of Python, numpy and torch (every device) as JSON values."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": [version, list(numbers), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": _packed(torch.get_rng_state()),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = [_packed(s) for s in torch.cuda.get_rng_state_all()]
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what `random_state` gave."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_unpacked(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([_unpacked(s) for s in state["cuda"]])


def _packed(tensor: torch.Tensor) -> str:
    return base64.b64encode(tensor.cpu().numpy().tobytes()).decode("ascii")


def _unpacked(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
