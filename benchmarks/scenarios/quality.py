"""Every method on real tasks beside stock and LoRA: MiniLM's metric after training, by seed.

Needs the data folder beside the project and the MiniLM package. A run takes some CPU minutes, all of them many CPU
hours: each is written as it ends, and the next call goes on; several processes share the work. The main recipes come
before their variants; among them seeds are the outer loop, so that every recipe has a first figure before any has a
second.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import record
import sharing
from recipes import FUSED, LORA
from tasks import SST2, recipe_file, sts_benchmark

NAME = "quality"
QUICK = False
SEEDS = (0, 1, 2)
COLA = {
    "train": "cola/train.tsv.gz",
    "eval": "cola/dev.tsv",
    "columns": ["source", "label", "note", "sentence"],
    "text": ["sentence"],
    "label": "label",
}
TASKS: dict[str, dict[str, Any]] = {
    "SST-2": {
        "data": {**SST2, "rows": 5000},
        "metric": "accuracy",
        "epochs": 1,
    },
    "STS-B": {
        # of scores up to 5 adapters would learn the mean, and little more
        "data": {**sts_benchmark("en"), "scale": 0.2, "rows": 2500},
        "metric": "pearson",
        "epochs": 1,
    },
    "CoLA": {
        "data": COLA,
        "metric": "matthews",
        "epochs": 2,  # after one it still calls every sentence acceptable
    },
    "MRPC": {
        "data": {
            "train": "mrpc/msr_paraphrase_train.txt.gz",
            "eval": "mrpc/msr_paraphrase_test.txt.gz",
            "format": "tsv",
            "text": ["#1 String", "#2 String"],
            "label": "Quality",
            "rows": 2000,
        },
        "metric": "f1",
        "epochs": 2,
    },
    "Banking77": {
        "data": {
            "train": "banking77/train.csv.gz",
            "eval": "banking77/test.csv",
            "text": ["text"],
            "label": "category",
        },
        "metric": "accuracy",
        "epochs": 2,
    },
    "CoLA, 4 epochs": {
        # its seeds differ less once the task is learnt
        "data": COLA,
        "metric": "matthews",
        "epochs": 4,
    },
    "QNLI": {
        # the training part is not there: most of the validation part, against the rest of it
        "data": {
            "train": "qnli/dev.tsv.gz",
            "eval_fraction": 0.2677,
            "text": ["question", "sentence"],
            "label": "label",
        },
        "metric": "accuracy",
        "epochs": 1,
    },
    "WNUT-17": {
        "task": "token-classification",
        "data": {"train": "wnut17/train.conll.gz", "eval": "wnut17/dev.conll"},
        "metric": "f1",
        "epochs": 3,
    },
}
COMMON = {
    "batch_size": 32,
    "max_length": 128,
    "warmup_ratio": 0.1,
    "group_by_length": True,
    "optimizer": "adamw-fused",
}
FULL, ADAPTERS, SIDE = ({**COMMON, "learning_rate": rate} for rate in (1.0e-4, 1.0e-3, 3.0e-3))
COUPLED = {"k": 6}
"""Blocks coupled more loosely than by default, at which LoRA's rate is too high (STS-B, and SST-2 of one seed)."""
LADDER = {"reduction": 2}
CACHE = {"cache_bytes": 2**32}
CACHED = {**LADDER, **CACHE}
EPOCHS = {"LadderSide": 5, "Sherl": 5}
"""Epochs on every task, of recipes (and their variants) whose epochs are short."""
GROUPS: dict[str, dict[str, tuple[dict[str, Any], list[dict[str, Any]]]]] = {
    "baselines": {"stock": (FULL, []), "Lora": (ADAPTERS, LORA)},
    "activations": {
        "FusedOps": (FULL, FUSED),
        "FusedOps + Mesa": (FULL, [*FUSED, {"Mesa": {}}]),
        "FusedOps + WtaCrs": (FULL, [*FUSED, {"WtaCrs": {}}]),
        "WtaCrs": (FULL, [{"WtaCrs": {}}]),
        "Lora + Velora": (ADAPTERS, [*LORA, {"Velora": {}}]),
        "Lora + Velora, 96 groups": (ADAPTERS, [*LORA, {"Velora": {"groups": 96}}]),
        "Lora + Velora, all layers": (ADAPTERS, [*LORA, {"Velora": {"where": "*"}}]),
    },
    "tokens": {
        "TokenTune 16": (FULL, [{"TokenTune": {"count": 16}}]),
        "TokenTune 16, by score": (FULL, [{"TokenTune": {"count": 16, "policy": "score"}}]),
        "Lora + TokenTune 16": (ADAPTERS, [*LORA, {"TokenTune": {"count": 16}}]),
    },
    "reversible": {
        "Lora + Reversible": (ADAPTERS, [*LORA, {"Reversible": COUPLED}]),
        "Lora + Reversible, k = 4": (ADAPTERS, [*LORA, {"Reversible": {}}]),
        "Lora + Reversible, annealed": (ADAPTERS, [*LORA, {"Reversible": {**COUPLED, "anneal": 0.3}}]),
        **{
            f"Lora + Reversible, {variant}, anchors": (
                ADAPTERS,
                [*LORA, {"Reversible": {"variant": variant, "exact": False, "anchors": anchors}}],
            )
            for variant, anchors in (("meft1", 2), ("meft2", 2), ("meft3", 1))  # as far as the guard allows
        },
        "adapters, meft1": (
            ADAPTERS,
            [{"Reversible": {"variant": "meft1", "adapter_dim": 16, "merge": "weighted"}}],
        ),
    },
    "side": {
        "LadderSide": (ADAPTERS, [{"LadderSide": CACHED}]),
        "LadderSide, r = 4": (ADAPTERS, [{"LadderSide": {"reduction": 4, **CACHE}}]),
        "LadderSide, r = 8": (ADAPTERS, [{"LadderSide": CACHE}]),
        "LadderSide, pool": (ADAPTERS, [{"LadderSide": {**CACHED, "projection": "pool"}}]),
        "LadderSide, linear": (ADAPTERS, [{"LadderSide": {**LADDER, "projection": "linear"}}]),
        "LadderSide, random": (ADAPTERS, [{"LadderSide": {**CACHED, "init": "random"}}]),
        "LadderSide, as published": (
            ADAPTERS,
            [{"LadderSide": {**LADDER, "projection": "linear", "merge": "side"}}],
        ),
        "Sherl": (SIDE, [{"Sherl": {"reduction": 2, "late_layers": 2}}]),
        "Losa": (SIDE, [{"Losa": {}}]),
    },
}
ONLY = {"Banking77": ("baselines", "tokens"), "CoLA, 4 epochs": ("baselines", "activations")}
"""Tasks that not every group is for."""
MAIN = (
    *("stock", "Lora", "FusedOps", "FusedOps + Mesa", "WtaCrs", "Lora + Velora", "TokenTune 16"),
    *("Lora + Reversible", "Lora + Reversible, annealed", "LadderSide", "Sherl"),
)
"""Recipes that come before the others."""


def work(
    tasks: dict[str, dict[str, Any]], seeds: Sequence[int]
) -> list[tuple[str, str, int, dict[str, Any], list[dict[str, Any]]]]:
    """(task, recipe, seed, settings, methods) of every run."""
    runs = []
    for seed, task, group in itertools.product(seeds, tasks, GROUPS):
        if group in ONLY.get(task, GROUPS):
            for recipe, (rates, methods) in GROUPS[group].items():
                epochs = EPOCHS.get(recipe.partition(",")[0], tasks[task]["epochs"])
                settings = {**rates, "epochs": epochs, "seed": seed}
                runs.append((task, recipe, seed, settings, methods))
    return runs


def run(
    tasks: dict[str, dict[str, Any]] = TASKS,
    seeds: Sequence[int] = SEEDS,
    name: str = NAME,
    *,
    first: Sequence[str] = MAIN,
    **changed: Any,
) -> list[dict[str, Any]]:
    """One row per seed, task and recipe; a row of an earlier call counts as long as its run would be the same.

    Args:
        first: recipes that come before the others, with all their seeds.
        changed: training settings that differ from the table's.
    """
    config = {"tasks": tasks, "groups": GROUPS}
    todo = {}
    for task, recipe, seed, settings, methods in work(tasks, seeds):
        row = {"task": task, "recipe": recipe, "seed": seed, "data": tasks[task]["data"]}
        row |= {"train": {**settings, **changed}, "methods": methods, "metric": tasks[task]["metric"]}
        todo[_key(row)] = row
    order = {key: place for place, key in enumerate(todo)}

    def kept(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return sorted((row for row in rows if _key(row) in order), key=lambda row: order[_key(row)])

    for key, row in sorted(todo.items(), key=lambda item: item[1]["recipe"] not in first):
        with sharing.taken(name, key) as mine:
            if mine and key not in map(_key, record.rows(name)):
                kind = tasks[row["task"]].get("task", "sequence-classification")
                sharing.add(name, config, trained(row, kind), kept)
    return kept(record.rows(name))


def trained(row: dict[str, Any], task: str) -> dict[str, Any]:
    """The row with what its run gave.

    Args:
        task: as recipe files name it.
    """
    from tightfit.train.run import prepare, train

    with tempfile.TemporaryDirectory() as folder:
        file = recipe_file(row["data"], row["methods"], row["train"], Path(folder) / "run", task=task)
        result = train(file, prepared=prepare(file))
    value = result.metrics[row["metric"]]
    print({**{key: row[key] for key in ("task", "recipe", "seed")}, "value": value}, flush=True)
    return {
        **row,
        "value": value,
        "metrics": result.metrics,
        "train_seconds": result.train_seconds,
        "peak_bytes": result.peak_bytes,
        "predicted_peak_bytes": result.predicted_peak_bytes,
    }


def _key(row: dict[str, Any]) -> str:
    """What makes two runs the same."""
    return json.dumps([row[key] for key in ("data", "train", "methods", "metric")], sort_keys=True)
