"""LadderSide, Sherl and Losa beside stock and LoRA: peaks of forward and backward by plan, and step times.

Peaks are planned on whole models without weights. Times are CPU times of processes that take turns, of models with
fewer blocks; "cached" steps see examples whose features are kept already.
"""

from __future__ import annotations

import functools
from typing import Any

import record
import torch
from turns import forward_backward, measured, process

NAME = "side"
QUICK = False
CACHED: list[dict[str, Any]] = [{"LadderSide": {"cache_bytes": 2**31}}]
RECIPES: dict[str, list[dict[str, Any]]] = {
    "stock": [],
    "Checkpointing": [{"Checkpointing": {}}],
    "Lora": [{"Lora": {}}],
    "Lora + Checkpointing": [{"Lora": {}}, {"Checkpointing": {}}],
    "LadderSide": [{"LadderSide": {}}],
    "LadderSide, cached": CACHED,
    "LadderSide, pool": [{"LadderSide": {"projection": "pool"}}],
    "LadderSide, as published": [{"LadderSide": {"projection": "linear", "merge": "side"}}],
    "LadderSide + FusedOps": [{"LadderSide": {}}, {"FusedOps": {}}],
    "Sherl": [{"Sherl": {}}],
    "Losa": [{"Losa": {}}],
}
TIMED = ("Lora", "LadderSide", "LadderSide, cached", "Sherl", "Losa")
"""Other recipes' times, on four shapes, are those of `frontier`."""
LLAMA = {"hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8, "vocab_size": 1000}
T5 = {"d_model": 768, "d_ff": 3072, "num_heads": 12, "decoder_start_token_id": 0}
SETTINGS: dict[str, Any] = {
    "rounds": 5,
    "models": {
        "BERT-base, 16 x 128": {"family": "bert", "layers": 12, "timed": 4, "batch": (16, 128)},
        "T5-base, 8 x 128": {"family": "t5", "layers": 12, "timed": 3, "batch": (8, 128)},
        "Llama of width 512, 4 x 256": {"family": "llama", "layers": 8, "timed": 4, "batch": (4, 256)},
        "ViT-base, 8 images": {"family": "vit", "layers": 12, "timed": 4, "batch": (8, 197)},
    },
}


def build(settings: dict[str, Any], layers: int, weights: bool):
    """A model of so many blocks, in training mode."""
    import transformers as hf

    torch.manual_seed(0)
    with torch.device("cpu" if weights else "meta"):
        if settings["family"] == "bert":
            made: Any = hf.BertForSequenceClassification(hf.BertConfig(num_hidden_layers=layers))
        elif settings["family"] == "t5":
            made = hf.T5ForConditionalGeneration(hf.T5Config(**T5, num_layers=layers))
        elif settings["family"] == "vit":
            made = hf.ViTForImageClassification(hf.ViTConfig(num_hidden_layers=layers))
        else:
            made = hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA, num_hidden_layers=layers))
    return made.train()


def example(settings: dict[str, Any], model: Any) -> dict[str, torch.Tensor]:
    """A batch without padding."""
    from tightfit.core.simulate import example_batch

    if settings["family"] != "vit":
        return example_batch(model, *settings["batch"], padded=False)
    rows = settings["batch"][0]
    return {"pixel_values": torch.randn(rows, 3, 224, 224), "labels": torch.zeros(rows, dtype=torch.long)}


def applies(settings: dict[str, Any], recipe: str) -> bool:
    """Whether a recipe is for this family."""
    return not ("cached" in recipe and settings["family"] == "t5")


def planned(settings: dict[str, Any], methods: list[dict[str, Any]]) -> dict[str, int]:
    """Peak of forward and backward above the weights, bytes kept, and what trains, from a simulation."""
    import tightfit

    model = build(settings, settings["layers"], weights=False)
    batch = example(settings, model)
    found = tightfit.plan(model, tightfit.Recipe.from_list(methods), batch=batch, optimizer="sgd")
    return {
        "planned_peak_bytes": found.simulation.pass_bytes - found.by_category["weights"],
        "saved_bytes": found.simulation.saved_bytes,
        "trainable_parameters": found.trainable_parameters,
    }


def stepper(settings: dict[str, Any], methods: list[dict[str, Any]]):
    """Forward and backward of a real model under a recipe."""
    import tightfit

    model = build(settings, settings["timed"], weights=True)
    batch = example(settings, model)
    applied = tightfit.apply(model, tightfit.Recipe.from_list(methods))
    return forward_backward(applied, batch)


def run(settings: dict[str, Any] = SETTINGS, name: str = NAME) -> list[dict[str, Any]]:
    """Rows with `planned_peak_bytes` and rows with `seconds`, by model and recipe; resumes."""
    torch.set_num_threads(1)
    config = {**settings, "recipes": RECIPES}
    rows = record.rows(name, config)
    done = {(row["model"], row["recipe"], "seconds" in row) for row in rows}
    for model, own in settings["models"].items():
        for recipe, methods in RECIPES.items():
            if (model, recipe, False) in done or not applies(own, recipe) or "cached" in recipe:
                continue
            rows.append({"model": model, "recipe": recipe, **planned(own, methods)})
            print(rows[-1], flush=True)
            record.write(name, config, rows)
    for model, own in settings["models"].items():
        wanted = [r for r in TIMED if applies(own, r) and (model, r, True) not in done]
        if not wanted:
            continue
        with process(functools.partial(stepper, own, [])) as stock:
            for recipe in wanted:
                with process(functools.partial(stepper, own, RECIPES[recipe])) as other:
                    row = {"model": model, "recipe": recipe, **measured(stock, other, settings["rounds"])}
                rows.append(row)
                print(rows[-1], flush=True)
                record.write(name, config, rows)
    return rows
