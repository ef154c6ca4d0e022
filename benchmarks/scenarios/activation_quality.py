"""FusedOps, Mesa, WtaCrs and Velora on real tasks beside stock and LoRA: the metric after training, by seed.

Needs the data folder beside the project and the MiniLM package. A run takes some CPU minutes; each is written as it
ends, and the next call goes on.
"""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any

import record
from tasks import recipe_file

NAME = "activation_quality"
QUICK = False
SEEDS = (0, 1, 2)
TASKS: dict[str, dict[str, Any]] = {
    "SST-2": {
        "train": "sst2/train.tsv.gz",
        "eval": "sst2/dev.tsv",
        "text": ["sentence"],
        "label": "label",
        "rows": 5000,
    },
    "STS-B": {
        "train": "stsb_multi/stsb-en-train.csv.gz",
        "eval": "stsb_multi/stsb-en-dev.csv.gz",
        "columns": ["first", "second", "score"],
        "text": ["first", "second"],
        "label": "score",
        "regression": True,
    },
    "CoLA": {
        "train": "cola/train.tsv.gz",
        "eval": "cola/dev.tsv",
        "columns": ["source", "label", "note", "sentence"],
        "text": ["sentence"],
        "label": "label",
    },
    "MRPC": {
        "train": "mrpc/msr_paraphrase_train.txt.gz",
        "eval": "mrpc/msr_paraphrase_test.txt.gz",
        "format": "tsv",
        "text": ["#1 String", "#2 String"],
        "label": "Quality",
    },
}
EPOCHS = {"SST-2": 1, "STS-B": 1, "CoLA": 1, "MRPC": 3}
METRICS = {"MRPC": "f1", "CoLA": "matthews", "SST-2": "accuracy", "STS-B": "pearson"}
FULL = {"batch_size": 32, "learning_rate": 1.0e-4, "max_length": 128, "warmup_ratio": 0.1}
ADAPTERS = {**FULL, "learning_rate": 1.0e-3}
RECIPES: dict[str, list[dict[str, Any]]] = {
    "stock": [],
    "FusedOps": [{"FusedOps": {}}],
    "FusedOps + Mesa": [{"FusedOps": {}}, {"Mesa": {}}],
    "FusedOps + WtaCrs": [{"FusedOps": {}}, {"WtaCrs": {}}],
    "WtaCrs": [{"WtaCrs": {}}],
    "Lora": [{"Lora": {}}],
    "Lora + Velora": [{"Lora": {}}, {"Velora": {"where": "*"}}],
}


def run(seeds: tuple[int, ...] = SEEDS) -> list[dict[str, Any]]:
    """One row per seed, task and recipe."""
    from tightfit.train.run import prepare, train

    config = {"tasks": TASKS, "epochs": EPOCHS, "full": FULL, "adapters": ADAPTERS, "recipes": RECIPES}
    earlier = record.read(NAME)
    rows = earlier["rows"] if earlier and earlier["config"] == config else []
    done = {(row["task"], row["recipe"], row["seed"]) for row in rows}
    # the cheap tasks first: all together take more than a CPU day
    for task, seed in itertools.product(TASKS, seeds):
        prepared = None
        for recipe in RECIPES:
            if (task, recipe, seed) in done:
                continue
            settings = {**(ADAPTERS if recipe.startswith("Lora") else FULL), "epochs": EPOCHS[task], "seed": seed}
            with tempfile.TemporaryDirectory() as folder:
                file = recipe_file(TASKS[task], RECIPES[recipe], settings, Path(folder) / "run")
                prepared = prepared or prepare(file)
                found = train(file, prepared=prepared)
            rows.append(
                {
                    "task": task,
                    "recipe": recipe,
                    "seed": seed,
                    "metric": METRICS[task],
                    "value": found.metrics[METRICS[task]],
                    "metrics": found.metrics,
                    "peak_bytes": found.peak_bytes,
                    "predicted_peak_bytes": found.predicted_peak_bytes,
                }
            )
            record.write(NAME, config, rows)
            print(rows[-1], flush=True)
    return rows
