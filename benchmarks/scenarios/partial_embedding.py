"""PartialEmbedding on real tasks beside stock: metric, peak and its prediction, step time, exported checkpoint.

Needs the data folder beside the project (SST-2, STS-B in German) and the MiniLM package.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import record
import torch
from tasks import SST2, recipe_file, sts_benchmark

NAME = "partial_embedding"
QUICK = False
SEEDS = (0, 1, 2)
TASKS = {
    "SST-2": {"task": "sequence-classification", "data": {**SST2, "rows": 6000}},
    "STS-B de": {"task": "sequence-classification", "data": sts_benchmark("de")},
}
TRAIN = {"epochs": 1, "batch_size": 32, "learning_rate": 5.0e-5, "max_length": 128, "weight_decay": 0.0}
METHODS: dict[str, list[Any]] = {"stock": [], "PartialEmbedding": ["PartialEmbedding"]}


def run(seeds: tuple[int, ...] = SEEDS) -> list[dict[str, Any]]:
    """One row per task and seed, stock and PartialEmbedding side by side."""
    from tightfit.train.bench import step_time
    from tightfit.train.run import prepare, train

    config = {"train": TRAIN, "tasks": TASKS}
    rows = record.rows(NAME, config)
    done = {(row["task"], row["seed"]) for row in rows}
    for seed in seeds:
        for task_name, task in TASKS.items():
            if (task_name, seed) in done:
                continue
            with tempfile.TemporaryDirectory() as folder:
                files = {
                    name: recipe_file(
                        task["data"], methods, {**TRAIN, "seed": seed}, Path(folder) / name, task=task["task"]
                    )
                    for name, methods in METHODS.items()
                }
                prepared = prepare(files["stock"])
                found = {name: train(file, prepared=prepared) for name, file in files.items()}
                stock, part = found["stock"], found["PartialEmbedding"]
                row = {
                    "task": task_name,
                    "seed": seed,
                    "metric": part.metric_name,
                    "stock": stock.metric,
                    "partial_embedding": part.metric,
                    "identical": stock.metrics == part.metrics,
                    "kept_rows": len(part.recipe.transforms[0].ids),
                    "stock_peak_bytes": stock.peak_bytes,
                    "peak_bytes": part.peak_bytes,
                    "predicted_drop": stock.predicted_peak_bytes - part.predicted_peak_bytes,
                    "measured_drop": stock.peak_bytes - part.peak_bytes,
                    "batch": part.measured_batch,
                }
                if seed == seeds[0]:
                    treated = files["PartialEmbedding"]
                    ratios = [step_time(treated, part.recipe, prepared, rounds=7)[0] for _ in range(3)]
                    row["step_time"] = statistics.median(ratios)
                    row["step_time_runs"] = ratios
                    row["export"] = check_export(files["PartialEmbedding"], prepared)
                rows.append(row)
                record.write(NAME, config, rows)
                print(row, flush=True)
    return rows


def check_export(file, prepared) -> dict[str, Any]:
    """Export the finished run and load it plainly: keys that do not fit, and the largest logit difference."""
    import tightfit
    from tightfit.train.data import longest_batch
    from tightfit.train.tasks import build_model

    applied = tightfit.load(build_model(file, prepared.data), file.output)
    batch = {k: v for k, v in longest_batch(prepared.data, 8).items() if k != "labels"}
    with tempfile.TemporaryDirectory() as folder:
        applied.export(Path(folder) / "stock")
        plain, info = type(applied.model).from_pretrained(Path(folder) / "stock", output_loading_info=True)
    with torch.no_grad():
        difference = (applied.model.eval()(**batch).logits - plain.eval()(**batch).logits).abs().max()
    odd = {key: sorted(map(str, value)) for key, value in info.items() if key.endswith("_keys") and value}
    return {"odd_keys": odd, "largest_logit_difference": float(difference)}
