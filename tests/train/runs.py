"""A tiny run: a real tokenizer, a two-layer model with dropout, rows that can be learnt."""

import gc
import random

import torch
from tiny_models import bert

from tightfit.train.recipe_file import RecipeFile

GOOD, BAD = ["good", "fine", "very fine"], ["bad", "dull", "bad bad"]


def rows(count, seed=0):
    draw = random.Random(seed)
    lines = ["sentence\tlabel"]
    for _ in range(count):
        label = draw.random() < 0.5
        words = " ".join(draw.choice(["the", "film", "was", "plot", "actor"]) for _ in range(draw.randint(0, 3)))
        lines.append(f"{draw.choice(GOOD if label else BAD)} {words}\t{int(label)}")
    return "\n".join(lines) + "\n"


def project(folder):
    """A folder with a model, train.tsv, dev.tsv and recipe.yaml."""
    torch.manual_seed(0)
    bert(folder / "model")
    (folder / "train.tsv").write_text(rows(40))
    (folder / "dev.tsv").write_text(rows(16, seed=1))
    (folder / "recipe.yaml").write_text(f"""\
model: {folder}/model
task: sequence-classification
data: {{train: {folder}/train.tsv, eval: {folder}/dev.tsv, text: [sentence], label: label}}
methods: []
train: {{epochs: 2, batch_size: 8, learning_rate: 1.0e-3, max_length: 16, logging_steps: 1}}
output: {folder}/run
""")
    return folder


def recipe_file(folder, methods=(), output="run", **train):
    settings = {"epochs": 2, "batch_size": 8, "learning_rate": 1e-3, "max_length": 16, "logging_steps": 1} | train
    data = {"train": str(folder / "train.tsv"), "eval": str(folder / "dev.tsv"), "text": ["sentence"], "label": "label"}
    return RecipeFile(
        model=str(folder / "model"),
        task="sequence-classification",
        data=data,
        methods=list(methods),
        train=settings,
        output=str(folder / output),
    )


def only_train(monkeypatch):
    """Leave out the measured and the simulated step, where a test is about the weights. Call `gc.unfreeze` after it."""
    from tightfit import Measurement
    from tightfit.train import bench, run

    monkeypatch.setattr(bench, "measure_applied", lambda *a: Measurement(1, 1, 1, 1.0, {}))
    monkeypatch.setattr(run, "_predicted", lambda *a: None)
    gc.freeze()  # the Trainer collects garbage often; what the imports left need not be looked at
