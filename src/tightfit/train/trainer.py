"""The Trainer of a run: transformers' own, with whole checkpoints, a metrics file and a clean stop."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerState
from transformers.trainer_pt_utils import LengthGroupedSampler

from tightfit.core.errors import RecipeError, TrainingError
from tightfit.train import checkpoints
from tightfit.train.data import longest_batch
from tightfit.train.tasks import metrics_for, preprocess_logits_for

if TYPE_CHECKING:
    from tightfit.core.apply import Applied
    from tightfit.train.data import TaskData
    from tightfit.train.recipe_file import TrainSection

CHECKPOINTS = "checkpoints"
OPTIMIZERS = {"adamw": "adamw_torch", "adamw-fused": "adamw_torch_fused", "sgd": "sgd", "adafactor": "adafactor"}
NOT_LOGGED = ("total_flos", "train_runtime", "train_samples_per_second", "train_steps_per_second")


def training_arguments(section: TrainSection, folder: Path) -> TrainingArguments:
    """A recipe file's `train` section as `TrainingArguments`; nothing is reported anywhere."""
    every = {"eval": section.eval_every, "save": section.save_every}
    return TrainingArguments(
        output_dir=str(folder / CHECKPOINTS),
        num_train_epochs=section.epochs,
        max_steps=section.max_steps or -1,
        per_device_train_batch_size=section.batch_size,
        per_device_eval_batch_size=section.eval_batch_size or section.batch_size,
        gradient_accumulation_steps=section.gradient_accumulation,
        learning_rate=section.learning_rate,
        weight_decay=section.weight_decay,
        warmup_steps=min(section.warmup_ratio, 1 - 1e-9),  # 1 would mean one step
        lr_scheduler_type=section.scheduler,
        optim=OPTIMIZERS[section.optimizer],
        max_grad_norm=section.max_grad_norm,
        seed=section.seed,
        data_seed=section.seed,
        use_cpu=not torch.accelerator.is_available(),
        bf16=section.precision == "bf16",
        fp16=section.precision == "fp16",
        logging_steps=section.logging_steps,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if every["eval"] else "epoch",
        eval_steps=every["eval"],
        save_strategy="steps" if every["save"] else "epoch",
        save_steps=every["save"] or 500,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
    )


class GroupedByLength(LengthGroupedSampler):
    """transformers' sampler, but its order is that of the epoch alone, so that a resumed run finds its place."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's loader before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self.seed + self.epoch)
        return super().__iter__()


class RunTrainer(Trainer):
    """transformers' Trainer, but a checkpoint is written by `checkpoints` and evaluation leaves no trace.

    Evaluation puts the random state back, so that a run that resumes after it draws the same numbers; a loss that
    is not finite stops the run before it reaches the weights.
    """

    applied: Applied
    group_by_length = False

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        before = checkpoints.random_state()
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            checkpoints.set_random_state(before)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        if not self.group_by_length:
            return super()._get_train_sampler(rows)
        group = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return GroupedByLength(group, [len(ids) for ids in rows["input_ids"]], self.args.seed)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise TrainingError(
                f"step {self.state.global_step + 1}: the loss is {float(loss)}; the weights are as after step "
                f"{self.state.global_step}; lower train.learning_rate, or use precision bf16 or fp32"
            )
        return loss

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        assert self.optimizer is not None
        self.store_flos()
        states = _gathered(checkpoints.random_state())
        if self.args.should_save:
            folder = Path(str(self.args.output_dir))
            checkpoints.write_checkpoint(
                folder,
                self.applied,
                step=self.state.global_step,
                trainer_state=self.state,
                optimizer=self.optimizer,
                scheduler=self.lr_scheduler,
                scaler=self.accelerator.scaler,
                random_states=states,
            )
            checkpoints.drop_old(folder)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        pass  # the recipe and its weights were loaded before this Trainer was built

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            assert self.optimizer is not None and self.lr_scheduler is not None
            inner = getattr(self.optimizer, "optimizer", self.optimizer)
            checkpoints.load_optimizer(Path(checkpoint), inner)
            checkpoints.load_parts(Path(checkpoint), self.applied)
            self.lr_scheduler.load_state_dict(checkpoints.read_state(Path(checkpoint))["scheduler"])

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.accelerator.scaler is not None:
            state = checkpoints.read_state(Path(checkpoint))["scaler"]
            if state is not None:
                self.accelerator.scaler.load_state_dict(state)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        states = checkpoints.read_state(Path(checkpoint))["random"]
        if len(states) != self.args.world_size:
            raise RecipeError(
                f"{checkpoint}: was written by {len(states)} processes, this run has {self.args.world_size}; resume "
                f"with as many"
            )
        checkpoints.set_random_state(states[self.args.process_index])


def _gathered(state: dict[str, Any]) -> list[dict[str, Any]]:
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return [state]
    states: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(states, state)
    return states


def build_trainer(
    applied: Applied, data: TaskData, section: TrainSection, folder: Path, callbacks: list[TrainerCallback]
) -> RunTrainer:
    """The Trainer of a run. Raises: RecipeError for sharded training, which checkpoints do not cover."""
    trainer = RunTrainer(
        model=applied.model,
        args=training_arguments(section, folder),
        train_dataset=data.train,
        eval_dataset=data.eval,
        data_collator=data.collator,
        compute_metrics=metrics_for(data),
        preprocess_logits_for_metrics=preprocess_logits_for(data),
        callbacks=[applied.callback(), *callbacks],
    )
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise RecipeError(
            "train: FSDP and DeepSpeed are not supported by this command; launch plain data-parallel processes, or "
            "use tightfit.apply in your own script"
        )
    trainer.applied = applied
    trainer.group_by_length = section.group_by_length
    if trainer.model_accepts_loss_kwargs:
        trainer.model_accepts_loss_kwargs = counts_items(applied.model, data, trainer.args.device)
    for chatty in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(chatty)
    return trainer


def counts_items(model: Any, data: TaskData, device: torch.device) -> bool:
    """Whether the model's loss divides by `num_items_in_batch`, found by asking it twice.

    The Trainer takes it from the signature, but BERT's classifiers, T5 and others accept the argument and ignore
    it; then accumulated and data-parallel gradients come out too large by as many times as there are parts.
    """
    batch = {k: v.to(device) for k, v in longest_batch(data, 1).items() if torch.is_tensor(v)}
    before, was_training = checkpoints.random_state(), model.training
    model.eval()
    try:
        with torch.no_grad():
            losses = [float(model(**batch, num_items_in_batch=torch.tensor(n, device=device)).loss) for n in (1, 64)]
    finally:
        model.train(was_training)
        checkpoints.set_random_state(before)
    return losses[0] != losses[1]


def trainer_state(checkpoint: Path) -> TrainerState:
    """The Trainer's state in a checkpoint."""
    return TrainerState.load_from_json(str(checkpoint / checkpoints.TRAINER_FILE))


class RunCallback(TrainerCallback):
    """Writes the metrics file, tells the user, and stops the run in good order when asked to."""

    def __init__(self, metrics: Path, echo: Callable[[str], None]):
        self._metrics = metrics
        self._echo = echo
        self.interrupted = False
        self._save_at_epoch_end = False

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        values = {key: value for key, value in (logs or {}).items() if key not in NOT_LOGGED}
        if values.keys() - {"epoch"}:
            append_line(self._metrics, {"step": state.global_step, **values})
        scores = {k: v for k, v in values.items() if k.startswith("eval_") and not k.endswith(("_second", "_runtime"))}
        if scores:
            shown = ", ".join(f"{k.removeprefix('eval_')} {v:.4f}" for k, v in scores.items() if isinstance(v, float))
            self._echo(f"step {state.global_step} of {state.max_steps}, epoch {state.epoch or 0:.2f}: eval {shown}")

    def on_step_end(self, args, state, control, **kwargs):
        if self.interrupted:
            control.should_save = control.should_training_stop = True
        if _epoch_is_over(state):
            # the evaluation at the end of the epoch comes first, so that a checkpoint never misses it
            self._save_at_epoch_end |= control.should_save
            control.should_save = False
        elif self.interrupted:
            control.should_evaluate = False
        return control

    def on_epoch_end(self, args, state, control, **kwargs):
        if self._save_at_epoch_end:
            control.should_save, self._save_at_epoch_end = True, False
        if self.interrupted and not _epoch_is_over(state):
            control.should_evaluate = control.should_save = False
        return control


def _epoch_is_over(state: TrainerState) -> bool:
    return state.epoch is not None and float(state.epoch).is_integer()


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
            self._bar.update(self._tasks["train"], description=f"training, loss {logs['loss']:.4f}")

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
    """Append one line of JSON in a single write and sync it."""
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    line = json.dumps(plain) + "\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        os.write(descriptor, line.encode("utf-8"))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def stopping_on_interrupt(callback: RunCallback, echo: Callable[[str], None]) -> Iterator[None]:
    """The first Ctrl-C lets the step finish and saves; the second one stops at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: Any) -> None:
        if callback.interrupted:
            raise KeyboardInterrupt
        callback.interrupted = True
        echo("stopping after this step; press Ctrl-C again to stop at once")

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
