"""The integrations: what a user's script does with a model that has a recipe on it, once for each library."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from checks.rows import Row
from integration_cases import (
    Watch,
    applied_to,
    assert_same_weights,
    batches_of,
    check_leaves,
    collated,
    copied,
    everything,
    quiet,
    rows_of,
    sentences,
    stock,
    tokenizer,
)
from transformers import TrainerCallback

STEPS = 4


class Keeps(TrainerCallback):
    """The weights after the last step, before the best ones are loaded."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == state.max_steps:
            self.last = copied(model)


def _train_with_trainer(row: Row, family: str, folder: Path, make: Callable[[Any, Any, list], Any]) -> None:
    """An unbroken run and one that goes on from its first checkpoint."""
    ends = []
    for resume in (False, True):
        applied = applied_to(row, stock(family))
        model, keeps = applied.model, Keeps()
        trainer = make(model, folder / "run", [applied.callback(), keeps])
        watch = Watch(model)
        trainer.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-2") if resume else None)
        assert trainer.state.global_step == STEPS
        ends.append(keeps.last)
        if not resume:
            watch.check()
            best = trainer.state.best_metric
            assert trainer.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-6)
            metrics = [entry["eval_seen"] for entry in trainer.state.log_history if "eval_seen" in entry]
            assert metrics == [4] * len(metrics) and len(metrics) > STEPS // 2
            check_leaves(row, family, applied, folder)
    assert_same_weights(ends[1], ends[0])


def seen(prediction: Any) -> dict[str, float]:
    """How many rows' predictions the metric was given."""
    predictions = prediction.predictions
    predictions = predictions[0] if isinstance(predictions, tuple) else predictions
    assert len(predictions) == len(prediction.label_ids)
    return {"seen": len(predictions)}


def settings(folder: Path) -> dict[str, Any]:
    return quiet(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        lr_scheduler_type="cosine",
        max_grad_norm=1.0,
        bf16=True,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
    )


def trainer(row: Row, family: str, folder: Path) -> None:
    from transformers import Trainer, TrainingArguments

    def make(model, folder, callbacks):
        arguments = TrainingArguments(**settings(folder))
        data = {"train_dataset": rows_of(model, 16), "eval_dataset": rows_of(model, 4, seed=1)}
        return Trainer(model=model, args=arguments, compute_metrics=seen, callbacks=callbacks, **data)

    _train_with_trainer(row, family, folder, make)


def seq2seq_trainer(row: Row, family: str, folder: Path) -> None:
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    def make(model, folder, callbacks):
        arguments = Seq2SeqTrainingArguments(
            **settings(folder), predict_with_generate=True, generation_max_length=4, generation_num_beams=1
        )
        data = {"train_dataset": rows_of(model, 16), "eval_dataset": rows_of(model, 4, seed=1)}
        return Seq2SeqTrainer(
            model=model,
            args=arguments,
            compute_metrics=seen,
            callbacks=callbacks,
            processing_class=tokenizer(),
            data_collator=collated,
            **data,
        )

    _train_with_trainer(row, family, folder, make)


def few_steps(folder: Path) -> dict[str, Any]:
    """What TRL's trainers are told alike."""
    return {
        "output_dir": str(folder / "run"),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "save_strategy": "no",
    }


def sft(row: Row, family: str, folder: Path) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    applied = applied_to(row, stock(family))
    arguments = SFTConfig(
        **quiet(
            **few_steps(folder),
            max_length=16,
        )
    )
    trainer = SFTTrainer(
        model=applied.model,
        args=arguments,
        train_dataset=Dataset.from_dict({"text": sentences(8, length=9)}),
        processing_class=tokenizer(),
        callbacks=[applied.callback()],
    )
    watch = Watch(applied.model)
    trainer.train()
    watch.check()
    check_leaves(row, family, applied, folder)


def dpo(row: Row, family: str, folder: Path) -> None:
    """The reference is the stock checkpoint, which TRL loads by the name in the model's config."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    model = stock(family)
    model.save_pretrained(folder / "base")
    model = type(model).from_pretrained(folder / "base").train()
    applied = applied_to(row, model)
    texts = {key: sentences(8, seed=seed) for seed, key in enumerate(("prompt", "chosen", "rejected"))}
    arguments = DPOConfig(
        **quiet(
            **few_steps(folder),
            logging_steps=1,
        )
    )
    trainer = DPOTrainer(
        model=applied.model,
        args=arguments,
        train_dataset=Dataset.from_dict(texts),
        processing_class=tokenizer(),
        callbacks=[applied.callback()],
    )
    assert type(trainer.ref_model) is type(stock(family))
    reference = copied(trainer.ref_model)
    watch = Watch(applied.model)
    trainer.train()
    watch.check()
    assert_same_weights(everything(trainer.ref_model), reference)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and losses[0] != losses[-1]
    check_leaves(row, family, applied, folder)


def _loop(model: Any, optimizer: torch.optim.Optimizer, batches: list[dict], steps: int) -> list[float]:
    """Losses of steps of two batches each, with clipping."""
    losses = []
    for step in range(steps):
        loss = 0.0
        for batch in batches[2 * step : 2 * step + 2]:
            part = model(**batch).loss / 2
            part.backward()
            loss += float(part.detach())
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
    return losses


def _lora():
    import peft

    return peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "query", "value", "q", "v"])


def peft_before(row: Row, family: str, folder: Path) -> None:
    """`get_peft_model`, then the recipe: the user's adapters train under it."""
    import peft

    torch.manual_seed(1)
    model = peft.get_peft_model(stock(family), _lora())
    applied = applied_to(row, model)
    watch = Watch(model)
    assert any("lora_A" in name for name in watch.trains)
    _loop(model, applied.optimizer(lr=1e-2, weight_decay=0.0), batches_of(stock(family), 8), STEPS)
    watch.check()
    _check_adapters(row, family, applied, model, folder)


def _check_adapters(row: Row, family: str, applied: Any, model: Any, folder: Path) -> None:
    """PEFT's own checkpoint holds the adapters, and its merge gives a stock model."""
    import peft

    batch = models.batch(stock(family), seed=9)
    trained = {name: value for name, value in copied(model).items() if "lora_" in name}
    model.save_pretrained(folder / "adapter")
    again = peft.PeftModel.from_pretrained(stock(family), folder / "adapter")
    assert_same_weights({n: v for n, v in copied(again).items() if n in trained}, trained)
    if applied is not None:
        applied.remove()
    merged = model.merge_and_unload()
    assert type(merged) is type(stock(family))
    model.eval()
    merged(**batch)


def peft_after(row: Row, family: str, folder: Path) -> None:
    """The recipe, then `get_peft_model`, which freezes all but its own."""
    import peft

    applied = applied_to(row, stock(family))
    torch.manual_seed(1)
    model = peft.get_peft_model(applied.model, _lora())
    watch = Watch(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    _loop(model, optimizer, batches_of(stock(family), 8), STEPS)
    watch.check()
    _check_adapters(row, family, applied, model, folder)


def loader_of(rows: list[dict[str, torch.Tensor]]) -> torch.utils.data.DataLoader:
    """Batches of two; the loader draws no number from the random state that the model draws from."""
    return torch.utils.data.DataLoader(rows, batch_size=2, collate_fn=collated, generator=torch.Generator())


def accelerate_loop(row: Row, family: str, folder: Path) -> None:
    from accelerate import Accelerator
    from transformers import get_cosine_schedule_with_warmup

    ends = []
    for resume in (False, True):
        torch.manual_seed(3)
        applied = applied_to(row, stock(family))
        accelerator = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=2, cpu=True)
        optimizer = applied.optimizer(lr=1e-2, weight_decay=0.0)
        loader = loader_of(rows_of(applied.model, 16))
        schedule = get_cosine_schedule_with_warmup(optimizer, 0, STEPS)
        model, optimizer, loader, schedule = accelerator.prepare(applied.model, optimizer, loader, schedule)
        accelerator.register_for_checkpointing(applied)
        watch = Watch(applied.model)
        if resume:
            accelerator.load_state(str(folder / "state"))
            loader = accelerator.skip_first_batches(loader, STEPS)
        for index, batch in enumerate(loader, STEPS if resume else 0):
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            if index == STEPS - 1 and not resume:
                accelerator.save_state(str(folder / "state"))
        watch.check()
        ends.append(copied(applied.model))
        if not resume:
            assert accelerator.unwrap_model(model) is applied.model
            check_leaves(row, family, applied, folder)
        reset_accelerate()
    assert_same_weights(ends[1], ends[0])


def torch_loop(row: Row, family: str, folder: Path) -> None:
    ends = []
    for resume in (False, True):
        applied = applied_to(row, stock(family))
        model, optimizer = applied.model, applied.optimizer(lr=1e-2, weight_decay=0.0)
        batches = batches_of(model, 2) * STEPS
        torch.manual_seed(3)
        if resume:
            checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
            model.load_state_dict(checkpoint["model"])
            applied.load_state_dict(checkpoint["recipe"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            torch.set_rng_state(checkpoint["random"])
            _loop(model, optimizer, batches, STEPS // 2)
        else:
            watch = Watch(model)
            losses = _loop(model, optimizer, batches, STEPS // 2)
            states = {"model": model, "recipe": applied, "optimizer": optimizer}
            states = {name: holder.state_dict() for name, holder in states.items()}
            torch.save({**states, "random": torch.get_rng_state()}, folder / "checkpoint.pt")
            losses += _loop(model, optimizer, batches, STEPS // 2)
            assert losses[-1] < losses[0]
            watch.check()
        ends.append(copied(model))
        if not resume:
            check_leaves(row, family, applied, folder)
    assert_same_weights(ends[1], ends[0])


def lightning_fit(row: Row, family: str, folder: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self, applied):
            super().__init__()
            self.model, self.applied = applied.model, applied

        def training_step(self, batch, index):
            return self.model(**batch).loss

        def validation_step(self, batch, index):
            self.log("eval_loss", self.model(**batch).loss)

        def configure_optimizers(self):
            return self.applied.optimizer(lr=1e-2, weight_decay=0.0)

        def on_save_checkpoint(self, checkpoint):
            checkpoint |= {"recipe": self.applied.state_dict(), "random": torch.get_rng_state()}

        def on_load_checkpoint(self, checkpoint):
            self.applied.load_state_dict(checkpoint["recipe"])
            torch.set_rng_state(checkpoint["random"])

        def on_train_batch_end(self, *_):
            if self.trainer.global_step == STEPS:
                self.last = copied(self.model)

    ends = []
    for resume in (False, True):
        applied = applied_to(row, stock(family))
        module = Module(applied)
        torch.manual_seed(3)
        trainer = lightning.Trainer(
            accelerator="cpu",
            precision="bf16-mixed",
            max_steps=STEPS,
            accumulate_grad_batches=2,
            gradient_clip_val=1.0,
            val_check_interval=4,
            default_root_dir=folder,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[
                lightning.pytorch.callbacks.ModelCheckpoint(folder / "steps", every_n_train_steps=2, save_top_k=-1)
            ],
        )
        watch = Watch(applied.model)
        # a checkpoint at the end of an epoch: Lightning does not skip the rows that a run has seen
        loader, held_out = loader_of(rows_of(applied.model, 8)), loader_of(rows_of(applied.model, 4, seed=1))
        first = next(iter((folder / "steps").glob("*step=2.ckpt")), None)
        trainer.fit(module, loader, held_out, ckpt_path=first if resume else None)
        watch.check()
        ends.append(module.last)
        if not resume:
            check_leaves(row, family, applied, folder)
    assert_same_weights(ends[1], ends[0])


def reset_accelerate() -> None:
    """Accelerate remembers the first precision of a process."""
    from accelerate.state import AcceleratorState, GradientState

    with contextlib.suppress(AttributeError):
        AcceleratorState._reset_state(True)
        GradientState._reset_state()


TEXT_FIRST = ("bert", "llama", "vit")
DECODER_FIRST = ("llama", "bert", "vit")

INTEGRATIONS: dict[str, tuple[Callable[[Row, str, Path], None], tuple[str, ...]]] = {
    "Trainer": (trainer, TEXT_FIRST),
    "Seq2SeqTrainer": (seq2seq_trainer, ("t5", "bart")),
    "SFTTrainer": (sft, ("llama",)),
    "DPOTrainer": (dpo, ("llama",)),
    "PEFT before": (peft_before, DECODER_FIRST),
    "PEFT after": (peft_after, TEXT_FIRST),
    "accelerate": (accelerate_loop, DECODER_FIRST),
    "torch": (torch_loop, TEXT_FIRST),
    "Lightning": (lightning_fit, DECODER_FIRST),
}
"""Name -> what runs, and the kinds of models it is run with: the first one on which the method works."""
