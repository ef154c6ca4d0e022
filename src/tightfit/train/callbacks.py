"""What listens to a run: the metrics file, lines for the user, a bar, and the stop in good order."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.trainer_callback import TrainerState

from tightfit.core.documents import finite
from tightfit.core.plan import mib
from tightfit.train.metrics import is_score
from tightfit.train.stopping import StopRequest

if TYPE_CHECKING:
    from tightfit.train.recipe_file import TrainSection

NOT_LOGGED = {
    "total_flos",
    "train_runtime",
    "train_samples_per_second",
    "train_steps_per_second",
    "train_loss",
    "eval_model_preparation_time",
}
"""Figures of this process alone, which a run that was resumed has several of."""


class EvaluationStopped(Exception):
    """An evaluation was left because the run was asked to stop."""


class RunCallback(TrainerCallback):
    """Writes the metrics file, tells the user, and stops the run in good order when asked to."""

    def __init__(self, metrics: Path, echo: Callable[[str], None], stop: StopRequest):
        self._metrics = metrics
        self._echo = echo
        self._stop = stop
        self._stopping = False
        self._save_at_epoch_end = False

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        values = {key: value for key, value in (logs or {}).items() if key not in NOT_LOGGED}
        if values.keys() - {"epoch"}:
            append_line(self._metrics, {"step": state.global_step, **values})
        place = f"step {state.global_step} of {state.max_steps}, epoch {state.epoch or 0:.2f}"
        scores = {k: v for k, v in values.items() if is_score(k)}
        if scores:
            shown = ", ".join(f"{k.removeprefix('eval_')} {v:.4f}" for k, v in scores.items() if isinstance(v, float))
            self._echo(f"{place}: eval {shown}")
        elif "loss" in values:
            self._echo(f"{place}: {logged_line(values)}")

    def skipped(self, state: TrainerState, step: int, reason: str) -> None:
        """Note a step whose batch was left out."""
        if state.is_world_process_zero:
            append_line(self._metrics, {"step": step, "skipped": reason})
            self._echo(f"step {step}: left out, {reason}")

    def on_step_end(self, args, state, control, **kwargs):
        self._stopping = self._stop.agree(args.device)
        if self._stopping:
            control.should_save = control.should_training_stop = True
        if _epoch_is_over(state):
            # the evaluation at the end of the epoch comes first, so that a checkpoint never misses it
            self._save_at_epoch_end |= control.should_save
            control.should_save = False
        elif self._stopping:
            control.should_evaluate = False
        return control

    def on_epoch_end(self, args, state, control, **kwargs):
        if self._save_at_epoch_end:
            control.should_save, self._save_at_epoch_end = True, False
        if self._stopping or (args.world_size == 1 and self._stop):
            control.should_save = control.should_training_stop = True  # a step that is saved already is not again
            control.should_evaluate = False
        return control

    def on_save(self, args, state, control, **kwargs):
        if args.world_size == 1 and self._stop:  # what has just been written is all there is to save
            self._stopping = control.should_training_stop = True
        return control

    def on_prediction_step(self, args, state, control, **kwargs):
        if args.world_size == 1 and self._stop:
            raise EvaluationStopped


def logged_line(values: dict[str, Any]) -> str:
    """What a user reads of a logged step.

    >>> logged_line({"loss": 0.5, "peak_bytes": 2**20, "predicted_peak_bytes": 2**21, "tokens_per_second": 1234.5})
    'loss 0.5000, peak 1.0 MiB (predicted 2.0 MiB), 1,234 tokens/s'
    """
    parts = [f"loss {values['loss']:.4f}"]
    if "peak_bytes" in values:
        predicted = values.get("predicted_peak_bytes")
        parts.append(f"peak {mib(values['peak_bytes'])}{f' (predicted {mib(predicted)})' if predicted else ''}")
    if "saved_bytes" in values:
        parts.append(f"saved {mib(values['saved_bytes'])}")
    parts += [f"{values[f'{u}_per_second']:,.0f} {u}/s" for u in ("tokens", "rows") if f"{u}_per_second" in values]
    return ", ".join(parts)


def _epoch_is_over(state: TrainerState) -> bool:
    return state.epoch is not None and float(state.epoch).is_integer()


def scores_at(state: Any) -> dict[str, float] | None:
    """The scores of an evaluation at a state's step, where there was one."""
    for entry in reversed(state.log_history):
        if "eval_loss" in entry and entry.get("step") == state.global_step:
            return entry
    return None


def evaluation_is_due(state: Any, section: TrainSection) -> bool:
    """Whether a run was stopped at a step before, or in the middle of, the evaluation that belongs to it."""
    if section.eval_every:
        due = state.global_step % section.eval_every == 0
    else:
        due = float(state.epoch or 0.5).is_integer()
    return due and scores_at(state) is None


class ProgressBar(TrainerCallback):
    """A bar on standard error over the whole run, in a terminal only."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._tasks: dict[str, Any] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        import sys

        if not (state.is_world_process_zero and sys.stderr.isatty()):
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._bar.start()
        self._tasks["train"] = self._bar.add_task("training", total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        if self._bar is not None:
            self._bar.update(self._tasks["train"], completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self._bar is not None and "loss" in (logs or {}):
            self._bar.update(self._tasks["train"], description=f"training, {logged_line(logs)}")

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if self._bar is None or eval_dataloader is None:
            return
        if "eval" not in self._tasks:
            self._tasks["eval"] = self._bar.add_task("evaluating", total=len(eval_dataloader))
        self._bar.advance(self._tasks["eval"])

    def on_evaluate(self, args, state, control, **kwargs):
        if self._bar is not None and "eval" in self._tasks:
            self._bar.remove_task(self._tasks.pop("eval"))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def append_line(path: Path, values: dict[str, Any]) -> None:
    """Append one line of JSON and sync it. Raises: OSError where only a part of it finds space."""
    line = json.dumps(finite(values)) + "\n"
    with path.open("ab") as file:
        file.write(line.encode("utf-8"))
        file.flush()
        os.fsync(file.fileno())
