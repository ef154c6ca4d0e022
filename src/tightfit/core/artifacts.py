"""Saved results: `recipe.json` + `tightfit.safetensors` on a known base, and stock checkpoints.

No pickle is written or read. Writes are atomic: a temporary file in the same folder, fsync, rename.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tightfit._version import __version__
from tightfit.core import hfmodel, processes
from tightfit.core.budget import parse_bytes
from tightfit.core.documents import parse_json
from tightfit.core.errors import ArtifactError, RecipeError, TightfitError, shorten
from tightfit.core.hub import CARD, card_text, check_repository, push
from tightfit.core.parameter import has_sharded, whole
from tightfit.core.quantised import packed_parts
from tightfit.core.recipe import FORMAT, Recipe

if TYPE_CHECKING:
    from tightfit.core.apply import Applied

RECIPE_FILE = "recipe.json"
TENSOR_FILE = "tightfit.safetensors"
_PART = "part:"
_SAMPLE = 4096


def save(applied: Applied, folder: str | os.PathLike) -> None:
    """Write the recipe and every tensor that training may have changed, both files or none.

    Sharded parameters (FSDP) are gathered: then every process must call this, and the first one writes.

    Raises:
        ArtifactError: the folder cannot be written; what an earlier save left there is as it was.
    """
    folder = Path(folder)
    tensors = _own_tensors(applied)
    document = {
        "tightfit": FORMAT,
        "version": __version__,
        "methods": applied.recipe.to_list(),
        "base": {
            "class": processes.class_name(applied.model),
            "tensors": _described(applied.model),
            "digests": _digests(applied, set(tensors)),
        },
    }
    with _first_process_writes(applied.model) as writes, explained(folder):
        if not writes:
            return
        folder.mkdir(parents=True, exist_ok=True)
        with replacing_all(folder / RECIPE_FILE, folder / TENSOR_FILE) as (recipe, data):
            _write_tensors(tensors, data)
            document["tensors_sha256"] = file_digest(data)
            recipe.write_text(json.dumps(document, indent=1), encoding="utf-8")


def load(model: nn.Module, folder: str | os.PathLike) -> Applied:
    """Rebuild a saved recipe on its base model, with the trained values in it.

    Args:
        model: the same stock base the result was trained on.
        folder: what `Applied.save` wrote.

    Raises:
        ArtifactError: a file is missing or damaged, or the base differs (both values are named). The model
            is left as it was.

    Example:
        >>> import tempfile, tightfit
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
        >>> model = BertForSequenceClassification(config)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with tightfit.apply(model, tightfit.Lora(rank=2)) as applied:
        ...         applied.save(folder)
        ...     tightfit.load(model, folder).recipe
        chain(Lora(rank=2))
    """
    from tightfit.core.apply import apply
    from tightfit.core.plan import Draft

    folder = Path(folder)
    document, tensors = read(folder)
    base = document["base"]
    if base["class"] != type(model).__name__:
        raise ArtifactError(
            f"{folder}: was saved on a {base['class']}, this model is a {type(model).__name__}; load the same base"
        )
    try:
        recipe = Recipe.from_list(document["methods"])
    except RecipeError as error:
        raise ArtifactError(f"{folder / RECIPE_FILE}: {error}") from error
    with _refused(folder):
        draft = Draft(model, recipe)
    if draft.applied is not None:  # before anything of a size that a damaged recipe names is made
        planned = draft.applied.model
        _check_base(folder, "is", base["tensors"], _described(planned))
        _check_fit(folder, _model_tensors(planned), _outside_parts(tensors))
    with _refused(folder):
        applied = apply(model, recipe)
    try:
        own = _own_tensors(applied)
        _check_fit(folder, own, tensors)
        _check_base(folder, "has digest", base["digests"], _digests(applied, set(tensors)))
        for part in applied.parts:
            prefix = f"{_PART}{type(part).__name__}/"
            with _refused(folder):
                part.load_tensors({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        # last, because stock parameters are written to and nothing can fail any more
        with torch.no_grad():
            for name, value in _outside_parts(tensors).items():
                own[name].copy_(value)
    except BaseException:
        applied.remove()
        raise
    return applied


@contextlib.contextmanager
def _refused(folder: Path) -> Iterator[None]:
    """A recipe from elsewhere may ask for what no library can do, and each of them says so in its own way."""
    try:
        yield
    except TightfitError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ArtifactError(f"{folder / RECIPE_FILE}: the recipe cannot be applied to this model ({reason})") from error


def read(folder: str | os.PathLike) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The document and the tensors of what `save` wrote.

    Raises:
        ArtifactError: a file is missing or damaged.
    """
    document = read_document(Path(folder))
    return document, _read_tensors(Path(folder), document)


def export(
    applied: Applied,
    folder: str | os.PathLike,
    *,
    max_shard_size: int | str = "5GB",
    push_to_hub: str | None = None,
    private: bool | None = None,
) -> None:
    """Write a stock checkpoint with everything merged, without touching the live model.

    Sharded parameters (FSDP) are gathered: then every process must call this, and the first one writes.
    """
    model: Any = applied.model
    if not hasattr(model, "save_pretrained"):
        raise ArtifactError(
            f"export: {type(model).__name__} has no save_pretrained; use merge() and save its state dict"
        )
    folder, shard_bytes = Path(folder), parse_bytes(max_shard_size, "max_shard_size")
    if push_to_hub is not None:
        check_repository(push_to_hub)
    state = applied.stock_state_dict(later=True)
    dtype = next((v.dtype for v in state.values() if v.is_floating_point()), None)  # save_pretrained empties `state`
    with _first_process_writes(model) as writes, explained(folder), config_kept(model):
        if not writes:
            return
        folder.parent.mkdir(parents=True, exist_ok=True)
        with replacing_folder(folder) as temporary:
            model.save_pretrained(temporary, state_dict=state, max_shard_size=shard_bytes)
            # it wrote the dtype of a stand-in, where the first parameter has one, and all would be loaded in that
            model.config.dtype = dtype
            model.config.save_pretrained(temporary)
            (temporary / CARD).write_text(card_text(model, applied.recipe), encoding="utf-8")
    if push_to_hub is not None and (not has_sharded(model) or processes.rank() == 0):
        push(folder, push_to_hub, private=private)


@contextlib.contextmanager
def _first_process_writes(model: nn.Module) -> Iterator[bool]:
    """Whether this process writes: all that call do, but of a sharded model, whose others wait for the first one."""
    if not has_sharded(model):
        yield True
        return
    try:
        yield processes.rank() == 0
    finally:
        processes.wait()


@contextlib.contextmanager
def config_kept(model: nn.Module) -> Iterator[None]:
    """Puts the config back: `save_pretrained` writes dtype and architectures into it, a call its problem type."""
    config = getattr(model, "config", None)
    before = dict(vars(config)) if config is not None else {}
    try:
        yield
    finally:
        if config is not None:
            vars(config).clear()
            vars(config).update(before)


# -- what is stored ---------------------------------------------------------------------------------------------


def _own_tensors(applied: Applied) -> dict[str, torch.Tensor]:
    """Everything training may change: trainable parameters, persistent buffers, the parts' own tensors."""
    own = {name: whole(tensor) for name, tensor in _model_tensors(applied.model).items()}
    for part in applied.parts:
        own.update({f"{_PART}{type(part).__name__}/{key}": value for key, value in part.tensors().items()})
    return own


def _outside_parts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(_PART)}


def _model_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return trained | _persistent_buffers(model)


def _check_fit(folder: Path, wanted: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> None:
    """Raises: ArtifactError unless the saved tensors have the names, shapes and types that the recipe gives."""
    wrong = sorted(set(wanted) ^ set(tensors)) or [
        f"{name} is {_description(tensors[name])}, the recipe gives {_description(tensor)}"
        for name, tensor in sorted(wanted.items())
        if not (_same_kind if name.startswith(_PART) else _same_form)(tensor, tensors[name])
    ]
    if wrong:
        raise ArtifactError(f"{folder / TENSOR_FILE}: tensors do not fit the recipe: {shorten(wrong, 5)}")


def _same_kind(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of a part may stand for each other; a part itself knows how long it has become."""
    return one.dtype == other.dtype and one.dim() == other.dim()


def _same_form(one: torch.Tensor, other: torch.Tensor) -> bool:
    return _description(one) == _description(other)


def _persistent_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        f"{prefix}.{key}" if prefix else key: buffer
        for prefix, module in model.named_modules()
        for key, buffer in module._buffers.items()
        if buffer is not None and key not in module._non_persistent_buffers_set
    }


def _described(model: nn.Module) -> dict[str, str]:
    return {name: _description(p) for name, p in model.named_parameters()}


def _description(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _digests(applied: Applied, saved: set[str]) -> dict[str, str]:
    """A digest of every base tensor that the saved file does not hold in full."""
    kept: dict[str, torch.Tensor] = {name: p for name, p in applied.model.named_parameters() if name not in saved}
    kept.update({f"{name} (rest)": rest for name, rest in applied.residue().items()})
    return {name: tensor_digest(whole(tensor)) for name, tensor in kept.items()}


def tensor_digest(tensor: torch.Tensor) -> str:
    """SHA-256 over shape, dtype and up to 4,096 evenly spaced elements."""
    parts = packed_parts(tensor)
    if parts is not None:
        inner = "".join(map(tensor_digest, parts))
        return hashlib.sha256(f"{tuple(tensor.shape)} {inner}".encode()).hexdigest()[:16]
    flat = tensor.detach().reshape(-1)
    step = max(1, -(-flat.numel() // _SAMPLE))
    sample = flat[::step].to("cpu", torch.float32)
    head = f"{tuple(tensor.shape)} {tensor.dtype}".encode()
    return hashlib.sha256(head + sample.numpy().tobytes()).hexdigest()[:16]


def _check_base(folder: Path, verb: str, saved: dict[str, str], here: dict[str, str]) -> None:
    for name in sorted(set(saved) | set(here)):
        if saved.get(name) != here.get(name):
            raise ArtifactError(
                f"{folder}: another base model: {name} {verb} {saved.get(name, 'absent')} in the saved base and "
                f"{here.get(name, 'absent')} in this one; load the checkpoint this result was trained on"
            )


def read_document(folder: Path) -> dict[str, Any]:
    """The `recipe.json` that `save` wrote. Raises: ArtifactError: it is missing or damaged."""
    path = folder / RECIPE_FILE
    if not path.is_file():
        raise ArtifactError(f"{folder}: no {RECIPE_FILE}; give the folder that Applied.save wrote")
    try:
        document = parse_json(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ArtifactError(f"{path}: not valid JSON ({error}); the file is damaged") from None
    if not isinstance(document, dict) or document.get("tightfit") != FORMAT:
        found = document.get("tightfit") if isinstance(document, dict) else type(document).__name__
        raise ArtifactError(f"{path}: format {found!r}, this version reads format {FORMAT}")
    base: Any = document.get("base")
    missing = [key for key in ("methods", "base", "tensors_sha256") if key not in document]
    missing += [
        f"base.{key}" for key in ("class", "tensors", "digests") if not isinstance(base, dict) or key not in base
    ]
    if missing:
        raise ArtifactError(f"{path}: the key(s) {shorten(missing)} are missing; the file is damaged")
    texts = {"tensors_sha256": document["tensors_sha256"], "base.class": base["class"]}
    for key in ("tensors", "digests"):
        if not isinstance(base[key], dict):
            raise ArtifactError(f"{path}: base.{key} is {base[key]!r}, expected names with texts; the file is damaged")
        texts |= {f"base.{key}.{name}": value for name, value in base[key].items()}
    odd = [f"{key} is {value!r}" for key, value in texts.items() if not isinstance(value, str)]
    if odd:
        raise ArtifactError(f"{path}: {shorten(odd, 3)}, expected a text; the file is damaged")
    return document


def _write_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    seen: set[int] = set()
    plain: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        key = hfmodel.storage_key(value)
        plain[name] = value.clone() if key in seen else value  # the format knows no views of one memory
        seen.add(key)
    save_file(plain, path)


def _read_tensors(folder: Path, document: dict[str, Any]) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / TENSOR_FILE
    if not path.is_file():
        raise ArtifactError(f"{folder}: no {TENSOR_FILE}; the artifact is incomplete")
    found = file_digest(path)
    if found != document["tensors_sha256"]:
        raise ArtifactError(
            f"{path}: SHA-256 {found[:16]}... does not match {document['tensors_sha256'][:16]}... in {RECIPE_FILE}; "
            f"the file is damaged or belongs to another save"
        )
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path}: cannot be read ({error})") from error


def file_digest(path: Path) -> str:
    """SHA-256 over a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- atomic writes ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def explained(folder: Path) -> Iterator[None]:
    """What a disk or a file system says while `folder` is written, as an ArtifactError."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ArtifactError(f"{folder}: could not be written ({reason}); what was there before is as it was") from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place, synced to disk, when the block succeeds."""
    with replacing_all(path) as (temporary,):
        yield temporary


@contextlib.contextmanager
def replacing_all(*paths: Path) -> Iterator[list[Path]]:
    """The same for files of one folder that belong together: none takes its place before all are on disk."""
    made: list[Path] = []
    try:
        for path in paths:
            handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
            made.append(Path(name))
            os.close(handle)
        yield made
        for temporary in made:
            _sync(temporary)
            temporary.chmod(0o666 & ~_umask())
        for temporary, path in zip(made, paths):
            temporary.replace(path)
        _sync(paths[0].parent)
    finally:
        for temporary in made:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place when the block succeeds; an existing one is refused.

    An empty one is replaced, behind a link the one that it leads to.
    """
    home = path.resolve()
    if home.exists() and (not home.is_dir() or any(home.iterdir())):
        raise ArtifactError(f"{path}: exists and is not an empty folder; give a new one")
    if home.is_mount() or home == Path.cwd():
        kind = "a mount point" if home.is_mount() else "the current folder"
        raise ArtifactError(f"{path}: is {kind}, which cannot be replaced as a whole; give a new folder inside of it")
    temporary = Path(tempfile.mkdtemp(prefix=f".{home.name}.", dir=home.parent))
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync(file)
        temporary.chmod(0o777 & ~_umask())
        if home.exists():
            home.rmdir()
        temporary.replace(home)
        _sync(home.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
