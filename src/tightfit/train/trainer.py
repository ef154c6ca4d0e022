"""The Trainer of a run: transformers' own, with whole checkpoints, a metrics file and a clean stop."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from tightfit.core import processes
from tightfit.core.errors import RecipeError, TrainingError
from tightfit.core.simulate.eight_bit import adamw_8bit, embedding_tables
from tightfit.train import checkpoints
from tightfit.train.callbacks import EvaluationStopped, RunCallback
from tightfit.train.data import longest_batch
from tightfit.train.non_finite import Part, find_source, first_broken
from tightfit.train.tasks import metrics_for, preprocess_logits_for

if TYPE_CHECKING:
    from tightfit.core.apply import Applied
    from tightfit.train.data import TaskData
    from tightfit.train.recipe_file import TrainSection

CHECKPOINTS = "checkpoints"
LOGS = "logs"
OPTIMIZERS = {
    "adamw": "adamw_torch",
    "adamw-fused": "adamw_torch_fused",
    "sgd": "sgd",
    "adafactor": "adafactor",
    "adamw-8bit": "adamw_8bit",
}


def training_arguments(section: TrainSection, folder: Path) -> TrainingArguments:
    """A recipe file's `train` section as `TrainingArguments`; trackers are callbacks of their own."""
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

    Evaluation puts the random state back, so that a run that resumes after it draws the same numbers; a loss or a
    gradient that is not finite never reaches the weights.

    Attributes:
        applied, section, listener: the recipe, the recipe file's `train`, and what tells the user.
        skipped: batches left out in a row, because their loss or gradient was not finite.
    """

    applied: Applied
    section: TrainSection
    listener: RunCallback
    group_by_length = False
    skipped = 0

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._parts: list[Part] = []
        self._losses: list[torch.Tensor] = []
        self._seen_by_a_method = ""

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: Any = None) -> tuple[Any, dict[str, Any]]:
        if args.optim != OPTIMIZERS["adamw-8bit"]:
            return Trainer.get_optimizer_cls_and_kwargs(args, model)
        options = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
        return adamw_8bit(), options | {"tables": embedding_tables(model)}

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

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        try:
            return super()._evaluate(*args, **kwargs)
        except EvaluationStopped:  # a resumed run evaluates before it goes on
            self.control.should_save = self.control.should_training_stop = True
            return {}

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        self._parts.append(Part.of(inputs, num_items_in_batch, self.args.device))
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
        except FloatingPointError as error:
            if self.args.world_size > 1:  # the others wait for this backward
                raise
            self._seen_by_a_method = str(error)
            loss = torch.full((), torch.nan, device=self.args.device)
        self._losses.append(loss)
        if self.section.non_finite == "stop":
            return loss
        shown = self._tr_loss / (1 + self.state.global_step - self._globalstep_last_logged)
        return torch.where(loss.isfinite(), loss, shown.to(loss.dtype))

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        norms = torch.as_tensor(norm, device=self.args.device)
        values = torch.stack([loss.float() for loss in self._losses])
        fine = values.isfinite().all()
        if self.accelerator.scaler is None:  # a gradient scaler looks after overflows itself
            fine = fine & norms.isfinite()
        if self.args.world_size > 1:
            fine = fine.float()
            torch.distributed.all_reduce(fine, torch.distributed.ReduceOp.MIN)
        if fine:
            self.skipped = 0
        else:
            self._leave_out(values, norms)
        self._parts, self._losses, self._seen_by_a_method = [], [], ""
        return float(norms)

    def _leave_out(self, losses: torch.Tensor, norm: torch.Tensor) -> None:
        """Drop the step's gradients. Raises: TrainingError where the run is to stop instead."""
        bad = [float(loss) for loss in losses if not loss.isfinite()]
        what = f"the loss is {bad[0]}" if bad else f"the gradient norm is {float(norm)}"
        if not bad and norm.isfinite():
            what = "another process's loss is not finite"
        model: Any = self.applied.model
        source = self._seen_by_a_method or find_source(model, self._parts, self._loss_again, self.args.device)
        step, self.skipped = self.state.global_step + 1, self.skipped + 1
        model.zero_grad(set_to_none=True)
        broken = first_broken(model)
        too_many = self.skipped > self.section.max_skipped
        if self.section.non_finite == "skip" and not broken and not too_many:
            self.listener.skipped(self.state, step, f"{what}: {source}")
            return
        remedy = "lower train.learning_rate, or use precision bf16 or fp32"
        if self.section.non_finite == "stop":
            remedy += ", or leave such batches out by train.non_finite: skip"
        elif broken:
            remedy += f"; leaving batches out does not help, {broken} is not finite"
        else:
            remedy += f"; {self.skipped} batches in a row, train.max_skipped allows {self.section.max_skipped}"
        raise TrainingError(
            f"step {step}: {what}: {source}; the weights are as after step {step - 1}, {self._newest()}; {remedy}"
        )

    def _loss_again(self, part: Part) -> torch.Tensor:
        with self.compute_loss_context_manager():
            inputs = self._prepare_inputs(part.inputs)
            loss: Any = self.compute_loss(self.applied.model, inputs, num_items_in_batch=part.items)
            return loss

    def _newest(self) -> str:
        found = checkpoints.checkpoints(Path(str(self.args.output_dir)))
        return f"the newest checkpoint is {found[-1]}" if found else "there is no checkpoint yet"

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        assert self.optimizer is not None
        broken = first_broken(self.applied.model)
        if broken:
            raise TrainingError(
                f"step {self.state.global_step}: {broken} is not finite after it, and no checkpoint is written of "
                f"that; {self._newest()}; lower train.learning_rate, or use precision bf16 or fp32"
            )
        self.store_flos()
        states = _gathered(checkpoints.random_state())
        kept = _gathered(self.applied.state_dict()) if processes.count() > 1 else ()
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
                kept=kept,
                skipped=self.skipped,
            )
            checkpoints.drop_old(folder)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        pass  # the recipe and its weights were loaded before this Trainer was built

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            assert self.optimizer is not None and self.lr_scheduler is not None
            inner = getattr(self.optimizer, "optimizer", self.optimizer)
            self.skipped = checkpoints.restore(
                Path(checkpoint), self.applied, inner, self.lr_scheduler, self.args.process_index
            )

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.accelerator.scaler is not None:
            checkpoints.restore_scaler(Path(checkpoint), self.accelerator.scaler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            checkpoints.restore_random(Path(checkpoint), self.args.process_index, self.args.world_size)


def _gathered(state: dict[str, Any]) -> list[dict[str, Any]]:
    """The states of every process, in all of them."""
    if processes.count() == 1:
        return [state]
    states: list[Any] = [None] * processes.count()
    torch.distributed.all_gather_object(states, state)
    return states


def build_trainer(
    applied: Applied,
    data: TaskData,
    section: TrainSection,
    folder: Path,
    listener: RunCallback,
    callbacks: list[TrainerCallback],
    predicted: int | None = None,
) -> RunTrainer:
    """The Trainer of a run.

    Args:
        listener, callbacks: what hears its events.
        predicted: bytes that the plan said, for the reports.

    Raises:
        RecipeError: for sharded training, which checkpoints do not cover.
    """
    trainer = RunTrainer(
        model=applied.model,
        args=training_arguments(section, folder),
        train_dataset=data.train,
        eval_dataset=data.eval,
        data_collator=data.collator,
        compute_metrics=metrics_for(data),
        preprocess_logits_for_metrics=preprocess_logits_for(data),
        callbacks=[applied.callback(predicted), listener, *callbacks, *trackers(section, folder)],
    )
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise RecipeError(
            "train: FSDP and DeepSpeed are not supported by this command; launch plain data-parallel processes, or "
            "use tightfit.apply in your own script"
        )
    trainer.applied, trainer.section, trainer.listener = applied, section, listener
    trainer.group_by_length = section.group_by_length
    if trainer.model_accepts_loss_kwargs:
        trainer.model_accepts_loss_kwargs = counts_items(applied.model, data, trainer.args.device)
    for chatty in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(chatty)
    return trainer


def trackers(section: TrainSection, folder: Path) -> list[TrainerCallback]:
    """The callbacks that `train.report_to` names; after the recipe's own, so that they get its figures too."""
    from transformers.integrations import get_reporting_integration_callbacks

    found = [cls() for cls in get_reporting_integration_callbacks(section.report_to)]
    for callback in found:
        if getattr(callback, "logging_dir", "") is None:
            callback.logging_dir = str(folder / LOGS)
    return found


def check_trackers(section: TrainSection) -> None:
    """Raise RecipeError for a tracker that transformers does not know or that is not installed."""
    from transformers.integrations import get_available_reporting_integrations

    here = get_available_reporting_integrations()
    for name in section.report_to:
        if name not in here:
            raise RecipeError(
                f"train.report_to: {name} is not installed, or transformers knows no such tracker; here are "
                f"{', '.join(here) or 'none'}, and metrics.jsonl is always written"
            )


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
