"""LearnableMemory: tasks added to a frozen ViT one after another, beside a linear probe and full fine-tuning.

Task 1: CIFAR-10, on which the model is trained here. Task 2: handwritten digits. Task 3: by which quarter turn a CIFAR
image was rotated. Needs the data folder beside the project.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import record
import torch
import turns
from side_images import accuracy, base, cifar, digits, fit

NAME = "learnable_memory"
QUICK = False
SEEDS = (0, 1, 2)
TASKS = {"digits": 10, "turns": 4}
RECIPES: dict[str, tuple[float, dict[str, Any] | str]] = {
    "linear probe": (1e-2, "probe"),
    "full fine-tuning": (5e-4, "full"),
    "isolated, 1 token": (2e-2, {"tokens": 1}),
    "isolated, 5 tokens": (2e-2, {}),
    "isolated, 5 tokens, extension": (2e-2, {"visibility": "extension"}),
    "isolated, 5 tokens, without the norm": (2e-2, {"memory_norm": False}),
    "shared, 5 tokens": (1e-2, {"mode": "shared"}),
}
SETTINGS: dict[str, Any] = {
    "vit": {
        "hidden_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "intermediate_size": 512,
        "image_size": 32,
        "patch_size": 8,
        "num_labels": 10,
        "hidden_dropout_prob": 0.0,
    },
    "base": {"epochs": 30, "batch": 64, "rate": 1e-3},
    "adapt": {"epochs": 15, "batch": 64},
    "train": 2000,
    "eval": 800,
    "rounds": 9,
}


def turned(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """CIFAR images of a split, each turned by a random number of quarters, which is its label."""
    pixels, _ = cifar(split)
    labels = torch.randint(4, (len(pixels),), generator=torch.Generator().manual_seed(0))
    return torch.stack([torch.rot90(p, int(y), (1, 2)) for p, y in zip(pixels, labels)]), labels


def data_of(settings: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """(train, held out) of each task."""
    pixels, labels = digits()
    train, held_out = settings["train"], settings["eval"]
    turns, seen = turned("train"), turned("test")
    return {
        "digits": ((pixels[:train], labels[:train]), (pixels[-held_out:], labels[-held_out:])),
        "turns": ((turns[0][:train], turns[1][:train]), (seen[0][:held_out], seen[1][:held_out])),
    }


@torch.no_grad()
def logits(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Logits in evaluation mode."""
    return torch.cat([model.eval()(pixel_values=p).logits for p in pixels.split(250)])


def alone(model: Any, kind: Any, rate: float, labels: int, data, settings: dict[str, Any], seed: int):
    """A copy of the model trained on one task, and how many parameters trained."""
    torch.manual_seed(seed)
    model = copy.deepcopy(model)
    model.classifier = torch.nn.Linear(model.config.hidden_size, labels)
    model.config.num_labels = labels
    prepare(model, kind, seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    fit(model, parameters, data, settings["adapt"], rate, seed)
    return model, sum(p.numel() for p in parameters)


def prepare(model: Any, kind: Any, seed: int = 0) -> None:
    """Make the model train what the recipe trains."""
    import tightfit

    if kind == "probe":
        model.vit.requires_grad_(False)
    elif kind != "full":
        tightfit.apply(model, tightfit.LearnableMemory(**kind, seed=seed))


def step_of(kind: Any, settings: dict[str, Any]):
    """A forward and backward on random images, for its time."""
    import transformers as hf

    torch.manual_seed(0)
    model = hf.ViTForImageClassification(hf.ViTConfig(**settings["vit"])).train()
    prepare(model, kind)
    batch = {"pixel_values": torch.randn(64, 3, 32, 32), "labels": torch.zeros(64, dtype=torch.long)}

    def step() -> None:
        model(**batch).loss.backward()
        model.zero_grad()

    return step


def step_time(kind: Any, settings: dict[str, Any]) -> float:
    """CPU time of a step, of that of full fine-tuning, in turns."""
    full, own = (functools.partial(step_of, each, settings) for each in ("full", kind))
    with turns.process(full) as one, turns.process(own) as other:
        return turns.measured(one, other, settings["rounds"])["measured"]


def planned(model: Any, kind: Any, batch: int) -> dict[str, int]:
    """Planned bytes of a training step: saved for backward, and the peak above the weights."""
    import tightfit

    model = copy.deepcopy(model)
    recipe = [tightfit.LearnableMemory(**kind)] if isinstance(kind, dict) else []
    if kind == "probe":
        prepare(model, kind)
    plan = tightfit.plan(model, recipe, batch=(batch, 1))
    above = plan.peak_bytes - plan.by_category["weights"]
    return {"saved_bytes": plan.simulation.saved_bytes, "planned_peak_bytes": above}


def in_turn(model: Any, fields: dict[str, Any], rate: float, tasks, settings: dict[str, Any], seed: int):
    """Isolated tasks on one model, one after another; yields a row of each."""
    import tightfit
    from tightfit.methods.learnable_memory import Memories

    model = copy.deepcopy(model)
    old_pixels = cifar("test")[0][: settings["eval"]]
    before = {"old": logits(model, old_pixels)}
    applied = None
    for task, (train, held_out) in tasks.items():
        if applied is None:
            recipe = tightfit.LearnableMemory(task=task, num_labels=TASKS[task], seed=seed, **fields)
            applied = tightfit.apply(model, recipe)
        else:
            applied.part(Memories).next(task, num_labels=TASKS[task])
        memories = applied.part(Memories)
        parameters = list(applied.parameters())
        fit(model, parameters, train, settings["adapt"], rate, seed)
        now = {}
        for served in ["old", *memories.names]:
            memories.use(served)
            now[served] = logits(model, old_pixels)
        yield {
            "task": task,
            "accuracy": accuracy(model, held_out),
            "trainable_parameters": sum(p.numel() for p in parameters),
            "earlier_logits_bit_identical": all(torch.equal(now[name], before[name]) for name in before),
        }
        before = now


def run(settings: dict[str, Any] = SETTINGS, seeds: tuple[int, ...] = SEEDS, name: str = NAME) -> list[dict[str, Any]]:
    """One row per recipe with its step time, and one per recipe, seed and task; resumes, but trains the base again."""
    torch.set_num_threads(1)
    config = {**settings, "recipes": RECIPES, "tasks": TASKS}
    rows = record.rows(name, config)
    done = {(row["recipe"], row["seed"], row["task"]) for row in rows}
    for recipe, (_, kind) in RECIPES.items():
        if (recipe, None, None) not in done:
            rows.append({"recipe": recipe, "seed": None, "task": None, "step_time": step_time(kind, settings)})
            record.write(name, config, rows)
            print(rows[-1], flush=True)
    if len(done) == len(RECIPES) * (len(seeds) * len(TASKS) + 1):
        return rows
    model, seen = base(settings)
    print({"base": "CIFAR-10", "accuracy": seen}, flush=True)
    tasks = data_of(settings)
    bytes_of = {recipe: planned(model, kind, settings["adapt"]["batch"]) for recipe, (_, kind) in RECIPES.items()}

    def add(row: dict[str, Any]) -> None:
        rows.append({**row, **bytes_of[row["recipe"]], "accuracy_of_the_base": seen})
        record.write(name, config, rows)
        print(rows[-1], flush=True)

    for seed in seeds:
        for recipe, (rate, kind) in RECIPES.items():
            head = {"recipe": recipe, "seed": seed}
            if isinstance(kind, dict) and kind.get("mode") != "shared":
                if all((recipe, seed, task) in done for task in TASKS):
                    continue
                rows = [row for row in rows if (row["recipe"], row["seed"]) != (recipe, seed)]
                for row in in_turn(model, kind, rate, tasks, settings, seed):
                    add({**head, **row})
                continue
            for task, (train, held_out) in tasks.items():
                if (recipe, seed, task) in done:
                    continue
                found, count = alone(model, kind, rate, TASKS[task], train, settings, seed)
                own = {"trainable_parameters": count}
                add({**head, "task": task, "accuracy": accuracy(found, held_out), **own})
    return rows
