"""Losa and its relatives on images: a small ViT, trained here on CIFAR-10 and frozen, adapted to handwritten digits.

Needs the data folder beside the project.
"""

from __future__ import annotations

import copy
import gzip
from typing import Any

import numpy as np
import record
import torch

NAME = "side_images"
QUICK = False
SEEDS = (0, 1, 2)
RECIPES: dict[str, tuple[float, list[dict[str, Any]] | None]] = {
    "head only": (1e-2, None),
    "stock": (3e-4, []),
    "Lora": (2e-3, [{"Lora": {}}]),
    "Losa": (3e-3, [{"Losa": {}}]),
    "Losa, no token mixing": (3e-3, [{"Losa": {"token_rank": 0}}]),
    "Losa, published start": (3e-3, [{"Losa": {"published": True}}]),
    "LadderSide": (3e-3, [{"LadderSide": {"reduction": 4}}]),
    "Sherl": (3e-3, [{"Sherl": {"reduction": 4}}]),
}
VIT = {
    "hidden_size": 192,
    "num_hidden_layers": 6,
    "num_attention_heads": 3,
    "intermediate_size": 768,
    "image_size": 32,
    "patch_size": 4,
    "num_labels": 10,
    "hidden_dropout_prob": 0.0,
}
SETTINGS: dict[str, Any] = {
    "vit": VIT,
    "base": {"epochs": 20, "batch": 64, "rate": 5e-4},
    "adapt": {"epochs": 2, "batch": 32},
    "train": 6000,
    "eval": 2000,
}


def cifar(split: str, limit: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of a split, scaled to [-1, 1], with their labels."""
    with np.load(record.SHARED / "data" / "cifar10_small" / "cifar10_small.npz") as arrays:
        images, labels = arrays[f"{split}_images"][:limit], arrays[f"{split}_labels"][:limit]
    return (torch.from_numpy(images).float() / 127.5 - 1).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels)


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Digits on 32 x 32 pixels and three channels, in a fixed random order."""
    folder = record.SHARED / "data" / "mnist10k"
    raw = np.frombuffer(gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes())[16:], np.uint8)
    labels = np.frombuffer(gzip.decompress((folder / "t10k-labels-idx1-ubyte.gz").read_bytes())[8:], np.uint8)
    pixels = torch.from_numpy(raw.reshape(-1, 1, 28, 28).copy()).float() / 127.5 - 1
    pixels = torch.nn.functional.pad(pixels, (2, 2, 2, 2), value=-1.0).expand(-1, 3, -1, -1)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return pixels[order], torch.from_numpy(labels.astype("int64"))[order]


def fit(model: Any, parameters: list, data, settings: dict[str, Any], rate: float, seed: int) -> None:
    """Plain training with AdamW and a rate that falls to zero."""
    pixels, labels = data
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    steps = settings["epochs"] * (len(labels) // settings["batch"])
    at = 0
    model.train()
    for _ in range(settings["epochs"]):
        for rows in torch.randperm(len(labels), generator=generator).split(settings["batch"]):
            if len(rows) < settings["batch"]:
                continue
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (at + 1) / 20) * (1 - at / steps)
            model(pixel_values=pixels[rows], labels=labels[rows]).loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            at += 1


@torch.no_grad()
def accuracy(model: Any, data) -> float:
    """Share of images that are classified rightly."""
    model.eval()
    right = [(model(pixel_values=p).logits.argmax(-1) == y).float() for p, y in zip(*(t.split(250) for t in data))]
    return float(torch.cat(right).mean())


def base(settings: dict[str, Any]):
    """A ViT trained on CIFAR-10, and its accuracy on the test images."""
    import transformers as hf

    torch.manual_seed(0)
    model = hf.ViTForImageClassification(hf.ViTConfig(**settings["vit"]))
    data = cifar("train", settings.get("images"))
    fit(model, list(model.parameters()), data, settings["base"], settings["base"]["rate"], 0)
    return model, accuracy(model, cifar("test"))


def adapted(model: Any, rate: float, methods: list[dict[str, Any]] | None, data, settings, seed: int):
    """The model under a recipe, with a new head, trained on digits; None: the head alone."""
    import tightfit

    torch.manual_seed(seed)
    model = copy.deepcopy(model)
    model.classifier.reset_parameters()
    if methods is None:
        model.vit.requires_grad_(False)
        parameters = list(model.classifier.parameters())
    else:
        parameters = list(tightfit.apply(model, tightfit.Recipe.from_list(methods)).parameters())
    fit(model, parameters, data, settings["adapt"], rate, seed)
    return model, sum(p.numel() for p in parameters)


def run(settings: dict[str, Any] = SETTINGS, seeds: tuple[int, ...] = SEEDS, name: str = NAME) -> list[dict[str, Any]]:
    """One row per recipe and seed; resumes, but trains the base again."""
    torch.set_num_threads(1)
    config = {**settings, "recipes": RECIPES}
    rows = record.rows(name, config)
    done = {(row["recipe"], row["seed"]) for row in rows}
    if len(done) == len(RECIPES) * len(seeds):
        return rows
    model, seen = base(settings)
    print({"base": "CIFAR-10", "accuracy": seen}, flush=True)
    pixels, labels = digits()
    train = pixels[: settings["train"]], labels[: settings["train"]]
    held_out = pixels[-settings["eval"] :], labels[-settings["eval"] :]
    for seed in seeds:
        for recipe, (rate, methods) in RECIPES.items():
            if (recipe, seed) in done:
                continue
            found, count = adapted(model, rate, methods, train, settings, seed)
            row = {"recipe": recipe, "seed": seed, "trainable_parameters": count}
            rows.append({**row, "accuracy": accuracy(found, held_out), "accuracy_of_the_base": seen})
            record.write(name, config, rows)
            print(rows[-1], flush=True)
    return rows
