"""What stopped a run, said so that the reader can act: no space on disk, or not enough memory."""

from __future__ import annotations

import errno
import re
import shutil
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tightfit.core.budget import machine_bytes
from tightfit.core.errors import BudgetError, SimulationError, TrainingError
from tightfit.core.plan import mib

if TYPE_CHECKING:
    from tightfit.core.recommend import Choice
    from tightfit.train.recipe_file import RecipeFile
    from tightfit.train.run import Prepared

CHEAPER_FILE = "cheaper.yaml"
LESS = 0.75
"""A recipe that may help takes at most this share of what the one that failed was predicted to take."""
PATIENCE_SECONDS = 120.0
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_SPACE_TEXT = re.compile(rf"No space left|os error ({'|'.join(map(str, _NO_SPACE))})\b")
_NO_MEMORY_TEXT = re.compile(r"can't allocate memory|Cannot allocate memory|bad_alloc|ALLOC_FAILED|out of memory", re.I)


# -- disk -------------------------------------------------------------------------------------------------------


def is_no_space(error: BaseException | None) -> bool:
    """Whether an error, or one behind it, says that a file system, a quota or a file-size limit is full."""
    return any(
        (isinstance(cause, OSError) and cause.errno in _NO_SPACE)
        or (type(cause).__name__ == "SafetensorError" and _NO_SPACE_TEXT.search(str(cause)))
        for cause in _causes(error)
    )


def no_space(folder: Path, what: str, needed: int | None = None) -> TrainingError:
    """The error for a full disk.

    Args:
        folder: where it could not be written.
        what: what could not be written.
        needed: its bytes, where they are known.
    """
    needs = f"{what} needs {needed:,} bytes ({mib(needed)})" if needed is not None else f"{what} cannot be written"
    try:
        free = f"{shutil.disk_usage(folder).free:,} are free there"
    except OSError:
        free = "what is free there cannot be told"
    return TrainingError(
        f"no space left in {folder}: {needs}, {free} (a quota or a file-size limit may allow less); earlier "
        f"checkpoints are intact, free some space and go on with --resume"
    )


def unwritten(error: BaseException | None) -> str:
    """Which file of a run there was no space for."""
    named = (str(cause.filename) for cause in _causes(error) if isinstance(cause, OSError) and cause.filename)
    return next(named, "a file of the run")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and those behind it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


# -- memory -----------------------------------------------------------------------------------------------------


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of the device or the machine could not be allocated.

    >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"))
    True
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError | OSError) and bool(_NO_MEMORY_TEXT.search(str(error)))


def out_of_memory(
    error: BaseException, file: RecipeFile, prepared: Prepared, predicted: int | None, echo: Callable[[str], None]
) -> TrainingError:
    """The error for a run that needs more memory than there is, with the next cheaper recipe.

    That recipe is the first of those that are predicted to take at most three quarters of what this one was; its
    file goes into the run folder.

    Args:
        predicted: what the plan said of the run's step, in bytes.
    """
    # the step's tensors live in the frames it left behind
    traceback.clear_frames(error.__traceback__)
    said = " ".join(str(error).split())[:200] or type(error).__name__
    start = f"out of memory: {said}"
    planned = f"; the plan said {mib(predicted)}" if predicted is not None else ""
    kept = "; checkpoints are kept, but another recipe begins another run"
    general = "; lower train.batch_size, or add a method to the recipe and look at `tightfit plan`"
    echo("out of memory; looking for a recipe that takes less")
    try:
        choice, path = cheaper(file, prepared, predicted)
    except BudgetError as none:
        return TrainingError(f"{start}{planned}; no recipe was found that takes a quarter less ({none}){general}")
    except (Exception, _TooLong):  # whatever goes wrong with the advice, the failure itself must be told
        return TrainingError(f"{start}{planned}{general}")
    parts = f", the batch in {choice.accumulation} parts" if choice.accumulation > 1 else ""
    return TrainingError(
        f"{start}{planned}; the next cheaper recipe is {choice.recipe} with train.batch_size {choice.batch_size}{parts}"
        f" (predicted {mib(choice.plan.peak_bytes)}, {choice.relative_step_time:.2f} x the stock step time): "
        f"`tightfit train {path}`{kept}"
    )


class _TooLong(BaseException):
    """The search for advice took longer than a reader would wait; nothing in between may catch it."""


def cheaper(file: RecipeFile, prepared: Prepared, predicted: int | None) -> tuple[Choice, Path]:
    """The best recipe that takes clearly less than this file's, and the recipe file written for it.

    Raises:
        BudgetError: there is none.
        SimulationError: the step cannot be simulated.
    """
    from tightfit.train.advice import Advisor
    from tightfit.train.recipe_file import write_recipe_file

    advisor = Advisor.of(file, prepared)
    if predicted is None:
        predicted = advisor.plan().peak_bytes
    limit = machine_bytes(advisor.device)
    budget = min(int(LESS * predicted), limit if limit is not None else predicted)
    if budget <= 0:
        raise SimulationError("the recipe cannot be applied")
    deadline = time.monotonic() + PATIENCE_SECONDS

    def tick(done: int, expected: int) -> None:
        if time.monotonic() > deadline:
            raise _TooLong

    choice = advisor.recommend(budget, progress=tick)[0]
    output = file.output.with_name(f"{file.output.name}-cheaper")
    path = file.output / CHEAPER_FILE
    write_recipe_file(advisor.chosen(choice).model_copy(update={"output": output}), path)
    return choice, path
