"""Side networks on real tasks beside stock and LoRA: MiniLM's metric after training, by seed.

Needs the data folder beside the project and the MiniLM package. Each run is written as it ends, and the next call goes
on.
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

NAME = "side_quality"
QUICK = False
SEEDS = (0, 1, 2)
SIDE = {**FULL, "learning_rate": 3.0e-3}
PUBLISHED = {"projection": "linear", "merge": "side", "reduction": 4}
RECIPES: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "stock": (FULL, []),
    "Lora": (ADAPTERS, [{"Lora": {}}]),
    "LadderSide": (SIDE, [{"LadderSide": {"reduction": 4}}]),
    "LadderSide, r = 8": (SIDE, [{"LadderSide": {}}]),
    "LadderSide, pool": (SIDE, [{"LadderSide": {"reduction": 4, "projection": "pool"}}]),
    "LadderSide, linear": (SIDE, [{"LadderSide": {"reduction": 4, "projection": "linear"}}]),
    "LadderSide, random": (SIDE, [{"LadderSide": {"reduction": 4, "init": "random"}}]),
    "LadderSide, as published": (SIDE, [{"LadderSide": PUBLISHED}]),
    "Sherl": (SIDE, [{"Sherl": {"reduction": 4}}]),
    "Losa": (SIDE, [{"Losa": {}}]),
}


def run(
    seeds: tuple[int, ...] = SEEDS,
    tasks: dict[str, dict[str, Any]] = TASKS,
    name: str = NAME,
    **changed: Any,
) -> list[dict[str, Any]]:
    """One row per task, seed and recipe."""
    from tightfit.train.run import prepare, train

    config = json.loads(json.dumps({"tasks": tasks, "epochs": EPOCHS, "recipes": RECIPES, **changed}))
    earlier = record.read(name)
    rows: list[dict[str, Any]] = earlier["rows"] if earlier and earlier["config"] == config else []
    done = {(row["task"], row["recipe"], row["seed"]) for row in rows}
    for task, seed in itertools.product(tasks, seeds):
        prepared = None
        for recipe, (rates, methods) in RECIPES.items():
            if (task, recipe, seed) in done:
                continue
            settings = {**rates, "epochs": EPOCHS[task], "seed": seed, **changed}
            with tempfile.TemporaryDirectory() as folder:
                file = recipe_file(tasks[task], methods, settings, Path(folder) / "run")
                prepared = prepared or prepare(file)
                found = train(file, prepared=prepared)
            rows.append(
                {
                    "task": task,
                    "recipe": recipe,
                    "seed": seed,
                    "metric": METRICS[task],
                    "value": found.metrics[METRICS[task]],
                    "peak_bytes": found.peak_bytes,
                    "predicted_peak_bytes": found.predicted_peak_bytes,
                }
            )
            record.write(name, config, rows)
            print(rows[-1], flush=True)
    return rows
