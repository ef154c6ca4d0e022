"""A run folder: what is in it, when it may be used, and how each file is written."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from tightfit._version import __version__
from tightfit.core import processes
from tightfit.core.artifacts import RECIPE_FILE, TENSOR_FILE, write_text
from tightfit.core.documents import parse_json
from tightfit.core.errors import ArtifactError, RecipeError
from tightfit.train.checkpoints import drop_leftovers
from tightfit.train.recipe_file import RecipeFile, read_recipe_file, write_recipe_file

if TYPE_CHECKING:
    from tightfit.train.data import TaskData

RECIPE = "recipe.yaml"
METRICS = "metrics.jsonl"
RUN = "run.json"
CARD = "README.md"
REPORT = "report.html"
CHECKPOINTS = "checkpoints"
WRITTEN = (RECIPE, METRICS, RUN, CARD, REPORT, RECIPE_FILE, TENSOR_FILE)


class _Part(BaseModel):
    model_config = ConfigDict(strict=True)


class _Data(_Part):
    fingerprint: str
    train_rows: int
    eval_rows: int
    task: str
    label_names: list[str] | None
    num_labels: int | None
    problem_type: str | None
    notes: list[str]


class _Result(_Part):
    steps: int
    metric_name: str
    metric: float
    metrics: dict[str, float]
    train_seconds: float
    trainable_parameters: int
    total_parameters: int
    measured_batch: str
    peak_bytes: int
    predicted_peak_bytes: int | None
    saved_bytes: int
    step_seconds: float
    exact: bool


class _Run(_Part):
    """What must be in `run.json`; a later version may write more into it."""

    tightfit: str
    directory: str = ""
    versions: dict[str, str]
    device: str
    recipe: str
    data: _Data
    result: _Result | None


def check_free(file: RecipeFile, resume: bool) -> None:
    """See that the output folder can be used before anything slow happens.

    Raises:
        RecipeError: no folder can have that name, it holds something and `resume` is False, it is no run folder, or
            it is the run of another recipe file (names the first key that differs).
    """
    folder = file.output
    try:
        os.stat(folder)
    except (FileNotFoundError, NotADirectoryError):
        pass  # `held` makes it, or says why not
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RecipeError(f"output: {str(folder)[:80]!r} cannot be used: {reason}") from None
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"output: {folder} is a file, accepted is a new or empty folder")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not resume:
        raise RecipeError(
            f"output: {folder} exists and is not empty; go on with it by --resume, or name another output"
        )
    if _is_beginning(folder):
        return
    if not (folder / RECIPE).is_file():
        raise RecipeError(f"output: {folder} is no run folder (no {RECIPE} in it); name another output")
    earlier = read_recipe_file(folder / RECIPE)
    for key, was, now in _differences(earlier.model_dump(mode="json"), file.model_dump(mode="json")):
        if key != "output":
            raise RecipeError(
                f"{key}: is {now!r}, the run in {folder} has {was!r}; resume with the same recipe file, or name "
                f"another output"
            )


@contextlib.contextmanager
def held(file: RecipeFile, resume: bool) -> Iterator[None]:
    """Make the output folder and keep it to this run, of several processes to the first one.

    Raises:
        RecipeError: it cannot be made, another run is at work in it, or has been since it was seen to be free.
    """
    if processes.rank():
        yield
        return
    folder = file.output
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"output: {folder} cannot be created: {error.strerror}") from None
    with _locked(folder):
        check_free(file, resume)
        yield


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RecipeError(
                f"output: another run is at work in {folder}; wait until it has ended, or name another output"
            ) from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)


def _is_beginning(folder: Path) -> bool:
    """Whether all that is in a folder is what a run writes before its recipe file, which may be cut off there."""
    return all(path.name == RUN or path.name.startswith((f".{RUN}.", f".{RECIPE}.")) for path in folder.iterdir())


def tidy(folder: Path) -> None:
    """Remove what a killed process left half written."""
    drop_leftovers(folder / CHECKPOINTS)
    for name in WRITTEN:
        for left in folder.glob(f".{name}.*"):
            left.unlink(missing_ok=True)


def _differences(one: Any, other: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(one, dict) and isinstance(other, dict):
        return [
            found
            for name in dict.fromkeys([*one, *other])
            for found in _differences(one.get(name), other.get(name), f"{key}.{name}" if key else name)
        ]
    return [] if one == other else [(key, one, other)]


def prepare(file: RecipeFile, data: TaskData, seen: str) -> None:
    """Write the run folder's first files, or check that the data are still those of the run.

    Args:
        seen: the recipe as it will be applied, for the reader.

    Raises:
        RecipeError: the data changed since the run began.
    """
    folder = file.output
    if (folder / RECIPE).is_file() and (folder / RUN).is_file():
        was = read_run(folder)["data"]["fingerprint"]
        if was != data.fingerprint:
            raise RecipeError(
                f"data: the rows are not those the run in {folder} began with (fingerprint {data.fingerprint[:12]}, "
                f"was {was[:12]}); name another output"
            )
        tidy(folder)
        return
    tidy(folder)
    write_text(folder / RUN, json.dumps(_first_entry(data, seen), indent=1))
    write_recipe_file(file, folder / RECIPE)


def _first_entry(data: TaskData, seen: str) -> dict[str, Any]:
    import platform

    import torch
    import transformers

    return {
        "tightfit": __version__,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "directory": str(Path.cwd()),
        "recipe": seen,
        "data": {
            "fingerprint": data.fingerprint,
            "train_rows": len(data.train),
            "eval_rows": len(data.eval),
            "task": data.task,
            "label_names": list(data.label_names) if data.label_names else None,
            "num_labels": data.num_labels,
            "problem_type": data.problem_type,
            "notes": list(data.notes),
        },
        "result": None,
    }


def read_run(folder: Path) -> dict[str, Any]:
    """A run folder's `run.json`. Raises: ArtifactError when the folder holds no run or the file is damaged."""
    path = Path(folder) / RUN
    if not path.is_file():
        raise ArtifactError(f"{folder}: no run is in this folder ({RUN} is missing); give the output of a run")
    try:
        document = parse_json(path.read_text(encoding="utf-8"))
        _Run.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise ArtifactError(f"{path}: {place}: {first['msg']}; the file is damaged") from None
    except (ValueError, OSError) as error:
        raise ArtifactError(f"{path}: cannot be read ({error}); the file is damaged") from None
    return document


def read_recipe(folder: Path) -> RecipeFile:
    """A run's recipe file; a model that is not here is looked for from the directory that the run began in."""
    directory = read_run(folder).get("directory", "")
    file = read_recipe_file(folder / RECIPE)
    begun = Path(directory, file.model)
    if not os.path.exists(Path(file.model).expanduser()) and os.path.isdir(begun):
        file = file.model_copy(update={"model": str(begun)})
    return file


def write_result(folder: Path, result: Any) -> None:
    """Put the figures of a finished run into its `run.json`."""
    document = read_run(folder)
    values = dataclasses.asdict(result)
    for key in ("output", "recipe"):
        values.pop(key)
    write_text(folder / RUN, json.dumps({**document, "result": values}, indent=1))


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`; a last line that was cut off, or another that is damaged, is left out."""
    path = Path(folder) / METRICS
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                row = parse_json(line)
                if isinstance(row, dict) and isinstance(row.get("step"), int):
                    rows.append(row)
    return rows


def rewind_metrics(folder: Path, step: int) -> None:
    """Drop the lines after `step`: a resumed run writes them again."""
    if (Path(folder) / METRICS).exists():
        kept = [row for row in read_metrics(folder) if row.get("step", 0) <= step]
        write_text(Path(folder) / METRICS, "".join(json.dumps(row) + "\n" for row in kept))


def stored_data(folder: Path, tokenizer: Any) -> TaskData:
    """What a run folder knows of its data: enough to build the model again, without any row."""
    from datasets import Dataset
    from transformers import DataCollatorWithPadding

    from tightfit.train.data import TaskData

    known = read_run(folder)["data"]
    nothing = Dataset.from_dict({})
    return TaskData(
        task=known["task"],
        train=nothing,
        eval=nothing,
        collator=DataCollatorWithPadding(tokenizer),
        fingerprint=known["fingerprint"],
        label_names=tuple(known["label_names"]) if known["label_names"] else None,
        num_labels=known["num_labels"],
        problem_type=known["problem_type"],
        notes=tuple(known["notes"]),
    )
