"""What is trained on one process and on several: a method, a model, batches, and what the results may differ by."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import torch
from checks.rows import ROWS

import tightfit
from tightfit.core import hfmodel

WORLD, STEPS, RATE = 2, 3, 0.1


@dataclasses.dataclass(frozen=True)
class Case:
    """One recipe on one model family.

    Attributes:
        draws: each process draws numbers of its own, so the first gradient is compared with the mean of the
            processes' own gradients, and what comes after it with nothing.
        even: rows of one length, where a mean over the rows of one process is not weighted by its targets.
        tolerance: of the result, as a share of what training has changed.
    """

    name: str
    family: str
    make: Callable[[Any], Any]
    draws: bool = False
    even: bool = False
    tolerance: float = 1e-3

    @property
    def key(self) -> str:
        return f"{self.name}/{self.family}"


DRAWS = ("wta-crs", "wta-crs-running", "token-tune-recurrent")
"""Draw from a process's own generator, or divide by a count that differs from one process's rows to the other's."""

ROUNDED = {"reversible": 1e-2, "mesa": 1e-2, "fused-ops-mesa": 1e-2}
"""Beginnings of the names of what rounds, so that a difference in the last bit may become one of a step."""

THREE = ("lora", "partial-embedding", "fused-ops", "reversible", "ladder-side", "sparse-adapter")
"""Rows that are tried on the encoder-decoder too."""


def _rows() -> list[Case]:
    own = [row for row in ROWS if row.name not in TEST_ONLY]
    return [
        _case(row.name, family, row.make)
        for row in own
        for family in (row.families if row.name in THREE else row.families[:2])
    ]


TEST_ONLY = ("half-table", "own-linear", "tape", "count-calls", "swap-tokens")


def _case(name: str, family: str, make: Callable[[Any], Any]) -> Case:
    tolerance = next((value for start, value in ROUNDED.items() if name.startswith(start)), 1e-3)
    # of T5 and of BERT's head the Trainer divides by nothing; selected tokens are a mean over their number
    even = not family.startswith("llama") or (name.startswith("token-tune") and name != "token-tune-bernoulli")
    return Case(name, family, make, name in DRAWS, even, tolerance)


def _more() -> list[Case]:
    t = tightfit
    kept = models.kept_ids
    made = {
        "stock": (lambda m: t.chain(), "bert", "llama", "llama-tied", "t5", "vit"),
        "partial-embedding": (lambda m: t.PartialEmbedding(ids=kept(m), force=True), "llama-tied", "bert-mlm"),
        "partial-embedding-fetch": (
            lambda m: t.PartialEmbedding(ids=kept(m), force=True, unknown="fetch"),
            "llama-tied",
        ),
        "partial-embedding-pruned": (
            lambda m: t.PartialEmbedding(ids=kept(m), force=True, head="pruned"),
            "llama-tied",
        ),
        "partial-embedding-lora-fused-ops": (
            lambda m: t.chain(t.PartialEmbedding(ids=kept(m), force=True), t.Lora(rank=2), t.FusedOps()),
            "llama",
        ),
        "fused-ops": (lambda m: t.FusedOps(), "llama-tied", "vit"),
        "fused-ops-mesa-wta-crs": (lambda m: t.chain(t.FusedOps(), t.Mesa(), t.WtaCrs(budget=1.0)), "llama", "bert"),
        "wta-crs-all": (lambda m: t.WtaCrs(budget=1.0), "llama", "bert"),
        "wta-crs-running": (lambda m: t.WtaCrs(min_rows=4, scores="running"), "llama"),
        "velora": (lambda m: t.Velora(groups=8), "vit"),
        "token-tune-score": (lambda m: t.TokenTune(ratio=0.5, policy="score"), "llama", "bert"),
        "token-tune-suffix": (lambda m: t.TokenTune(ratio=0.5, policy="suffix"), "llama"),
        "token-tune-bernoulli": (
            lambda m: t.TokenTune(ratio=0.5, policy="bernoulli", unbiased=True, normalise="all"),
            "llama",
        ),
        "token-tune-lora": (lambda m: t.chain(t.Lora(rank=2), t.TokenTune(ratio=0.5)), "llama"),
        "token-tune-recurrent": (
            lambda m: t.chain(t.RecurrentMemory(tokens=2, segment=4), t.TokenTune(ratio=0.5)),
            "llama",
        ),
        "reversible-meft2": (lambda m: t.Reversible(variant="meft2", adapter_dim=4), "llama", "bert"),
        "reversible-meft3": (lambda m: t.Reversible(variant="meft3", adapter_dim=4), "llama", "bert"),
        "reversible-lora": (lambda m: t.chain(t.Lora(rank=2), t.Reversible()), "llama"),
    }
    return [_case(name, family, make) for name, (make, *families) in made.items() for family in families]


CASES = {case.key: case for case in [*_rows(), *_more()]}


def batch(model, step: int, rank: int) -> dict[str, torch.Tensor]:
    """One process's rows of a step; every process has as many targets, so the mean of means is the joint mean."""
    return models.batch(model, size=2, seed=10 * step + rank)


def joint_batch(model, step: int) -> dict[str, torch.Tensor]:
    """The rows of all processes."""
    parts = [batch(model, step, rank) for rank in range(WORLD)]
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def applied_to(case: Case, seed: int = 0):
    """(model, applied), the same on every process but for what apply draws, which depends on `seed`."""
    model = models.build(case.family, dropout=0.0)
    torch.manual_seed(seed)
    return model, tightfit.apply(model, case.make(model))


def state_of(model, applied) -> dict[str, torch.Tensor]:
    """Everything that training may have changed, in full."""
    found = {name: _full(value).clone() for name, value in model.state_dict().items()}
    found |= {f"part:{key}": value.clone() for part in applied.parts for key, value in part.tensors().items()}
    return found


def _full(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gradients_of(model) -> dict[str, torch.Tensor]:
    return {n: _full(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None}


def loop(model, optimizer, batches, backward=torch.Tensor.backward) -> list[float]:
    """Losses of plain steps."""
    losses = []
    for one in batches:
        loss = model(**one).loss
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def one_process(case: Case, folder: Path) -> dict[str, Any]:
    """The run on the joint batches, in this process alone."""
    model, applied = applied_to(case)
    before = state_of(model, applied)
    torch.manual_seed(5)
    losses = loop(model, applied.optimizer(torch.optim.SGD, lr=RATE), [joint_batch(model, s) for s in range(STEPS)])
    leave(applied, folder)
    return {"before": before, "after": state_of(model, applied), "losses": losses}


def train_with_trainer(case: Case, model, applied, folder: Path, processes: int) -> None:
    """The same rows in the same order with transformers' Trainer, over `processes` processes."""
    from transformers import Trainer, TrainingArguments

    batches = [batch(model, step, rank) for step in range(STEPS) for rank in range(WORLD)]
    if case.even:
        batches = [models.batch(model, size=1, seed=seed) for seed in range(2 * len(batches))]
    rows = [{key: value[row] for key, value in one.items()} for one in batches for row in range(len(one["labels"]))]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=len(rows) // STEPS // processes,
        learning_rate=RATE,
        optim="sgd",
        lr_scheduler_type="constant",
        # other models accept the number of targets and take no notice, so their gradients would be scaled up by it
        average_tokens_across_devices=case.family.startswith("llama"),
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[applied.callback()])
    trainer.train()


def one_process_with_trainer(case: Case, folder: Path) -> dict[str, Any]:
    """The Trainer's run in this process alone."""
    model, applied = applied_to(case)
    before = state_of(model, applied)
    train_with_trainer(case, model, applied, folder, processes=1)
    leave(applied, folder)
    return {"before": before, "after": state_of(model, applied)}


def leave(applied, folder: Path) -> None:
    """Write what a run leaves: the artifact, and the stock checkpoint where there is one."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    applied.save(folder / "saved")
    with contextlib.suppress(tightfit.StateError):  # what it trained has no place in a stock model
        applied.export(folder / "stock")


def blocks_of(model) -> list[torch.nn.Module]:
    return [model.get_submodule(name) for stack in hfmodel.stacks(model) for name in stack]


def gap(found: dict, wanted: dict, before: dict) -> tuple[float, str]:
    """The largest difference as a share of the largest change of its tensor (or of 1 % of the largest of all)."""
    if set(found) != set(wanted):
        return float("inf"), f"names differ: {sorted(set(found) ^ set(wanted))[:4]}"
    moved = {n: _largest(wanted[n] - before.get(n, 0.0)) for n in wanted if wanted[n].is_floating_point()}
    floor = 0.01 * max(moved.values(), default=0.0)
    gaps = {n: _largest(found[n] - wanted[n]) / max(moved[n], floor, 1e-12) for n in moved}
    worst = max(gaps, key=gaps.get, default="")
    return gaps.get(worst, 0.0), worst


def _largest(t: torch.Tensor) -> float:
    return float(t.abs().max()) if t.numel() else 0.0
