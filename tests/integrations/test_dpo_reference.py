"""DPO's reference where TRL computes it beforehand: with the recipe on the model, and as the stock model has it."""

from __future__ import annotations

import math

import models
import pytest
import torch
from integration_cases import METHODS, applied_to, quiet, sentences, tokenizer

CHANGED = ("reversible", "reversible-meft1", "recurrent-memory")
"""Recipes under which the model computes something else from the first forward on."""
HEADS = ("partial-embedding-split", "partial-embedding-pruned")
"""Refused by TRL's trainers."""
QUICK = ("reversible",)
ROWS = [row for row in METHODS if "llama" in row.families and row.name not in HEADS]


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    models.build("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def trained(base, row=None, *, beforehand=True, cached=False):
    """(log-probs of the reference by row of the data, or None; the first step's loss)."""
    import datasets
    from trl import DPOConfig, DPOTrainer

    model = type(models.build("llama")).from_pretrained(base).train()
    callbacks = [] if row is None else [applied_to(row, model).callback()]
    texts = {key: sentences(6, seed=seed) for seed, key in enumerate(("prompt", "chosen", "rejected"))}
    texts = {key: [f" {text}" if key != "prompt" else text for text in found] for key, found in texts.items()}
    arguments = {"output_dir": "out", "max_steps": 1, "logging_steps": 1, "save_strategy": "no", "bf16": False}
    (datasets.enable_caching if cached else datasets.disable_caching)()
    try:
        trainer = DPOTrainer(
            model=model,
            args=DPOConfig(**quiet(**arguments), per_device_train_batch_size=2, precompute_ref_log_probs=beforehand),
            train_dataset=datasets.Dataset.from_dict(texts),
            processing_class=tokenizer(),
            callbacks=callbacks,
        )
    finally:
        datasets.enable_caching()
    trainer.train()
    names = ("ref_chosen_logps", "ref_rejected_logps")
    found = torch.tensor([trainer.train_dataset[name] for name in names]) if beforehand else None
    return found, trainer.state.log_history[0]["loss"]


@pytest.mark.parametrize(
    "row", [pytest.param(r, id=r.name, marks=() if r.name in QUICK else pytest.mark.slow) for r in ROWS]
)
def test_a_reference_computed_beforehand_is_the_model_at_its_start(row, base):
    """So the first loss is ln 2; and it is the stock model's own, where a method begins with its forward."""
    stock, _ = trained(base)
    found, loss = trained(base, row)
    assert loss == pytest.approx(math.log(2), abs=1e-6)
    assert torch.equal(found, stock) == (row.name not in CHANGED)
    assert (found - stock).abs().max() < 1


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGED)
def test_a_reference_that_is_loaded_is_the_stock_model(name, base):
    row = next(row for row in ROWS if row.name == name)
    _, loss = trained(base, row, beforehand=False)
    assert loss != pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.slow
def test_trl_looks_a_reference_up_by_rows_and_weights_alone(base):
    """As the docs say: a recipe without parameters of its own is given what was computed without it."""
    row = next(row for row in ROWS if row.name == "reversible")
    stock, _ = trained(base, cached=True)
    found, loss = trained(base, row, cached=True)
    assert torch.equal(found, stock)
    assert loss != pytest.approx(math.log(2), abs=1e-6)
