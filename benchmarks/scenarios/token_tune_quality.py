"""TokenTune on real tasks beside full training and LoRA: 16 of up to 128 tokens, the metric after training, by seed.

Needs the data folder beside the project and the MiniLM package. Each run is written as it ends, and the next call goes
on. MiniLM's dropout stays as it is.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import record
from activation_quality import ADAPTERS, EPOCHS, FULL, METRICS, TASKS
from tasks import recipe_file

NAME = "token_tune_quality"
QUICK = False
SEEDS = (0, 1, 2)
OWN = {name: TASKS[name] for name in ("SST-2", "MRPC", "CoLA")} | {
    "Banking77": {
        "train": "banking77/train.csv.gz",
        "eval": "banking77/test.csv",
        "text": ["text"],
        "label": "category",
    }
}
OWN_EPOCHS = {**EPOCHS, "Banking77": 3}
OWN_METRICS = {**METRICS, "Banking77": "accuracy"}
RECIPES: dict[str, list[dict[str, Any]]] = {
    "stock": [],
    "TokenTune 16": [{"TokenTune": {"count": 16}}],
    "TokenTune 16, by score": [{"TokenTune": {"count": 16, "policy": "score"}}],
    "Lora": [{"Lora": {}}],
    "Lora + TokenTune 16": [{"Lora": {}}, {"TokenTune": {"count": 16}}],
}


def run(
    tasks: dict[str, dict[str, Any]] = OWN,
    seeds: tuple[int, ...] = SEEDS,
    limits: dict[str, Any] | None = None,
    name: str = NAME,
) -> list[dict[str, Any]]:
    """One row per seed, task and recipe; `limits` are further settings of the runs."""
    from tightfit.train.run import prepare, train

    config = {"tasks": tasks, "epochs": OWN_EPOCHS, "full": FULL, "adapters": ADAPTERS, "recipes": RECIPES}
    earlier = record.read(name)
    rows = earlier["rows"] if earlier and earlier["config"] == json.loads(json.dumps(config)) else []
    done = {(row["task"], row["recipe"], row["seed"]) for row in rows}
    for task, seed in itertools.product(tasks, seeds):
        prepared = None
        for recipe in RECIPES:
            if (task, recipe, seed) in done:
                continue
            settings = {**(ADAPTERS if recipe.startswith("Lora") else FULL), "epochs": OWN_EPOCHS[task], "seed": seed}
            with tempfile.TemporaryDirectory() as folder:
                file = recipe_file(tasks[task], RECIPES[recipe], {**settings, **(limits or {})}, Path(folder) / "run")
                prepared = prepared or prepare(file)
                found = train(file, prepared=prepared)
            rows.append(
                {
                    "task": task,
                    "recipe": recipe,
                    "seed": seed,
                    "metric": OWN_METRICS[task],
                    "value": found.metrics[OWN_METRICS[task]],
                    "metrics": found.metrics,
                    "peak_bytes": found.peak_bytes,
                    "predicted_peak_bytes": found.predicted_peak_bytes,
                }
            )
            record.write(name, config, rows)
            print(rows[-1], flush=True)
    return rows
