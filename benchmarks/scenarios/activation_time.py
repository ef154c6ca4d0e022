"""Step times of FusedOps, Mesa, WtaCrs and their compositions against stock, on the CPU, forward and backward.

How a process's heap comes to lie moves a step's time by some percent for as long as it lives, so each ratio is the
median over the rounds of several pairs of processes.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import record
import torch
from turns import forward_backward, measured_in_pairs

NAME = "activation_time"
QUICK = False
PAIRS = 3
ROUNDS = 7
MODELS: dict[str, dict[str, Any]] = {
    "BERT-base blocks, 16 x 128": {"family": "bert", "layers": 3, "batch": (16, 128)},
    "Llama 8 x 512, vocabulary 32,000, 4 x 256": {"family": "llama", "layers": 8, "batch": (4, 256)},
}
RECIPES: dict[str, list[dict[str, Any]]] = {
    "Checkpointing": [{"Checkpointing": {}}],
    "FusedOps": [{"FusedOps": {}}],
    "FusedOps + Mesa": [{"FusedOps": {}}, {"Mesa": {}}],
    "FusedOps + Mesa, attention": [{"FusedOps": {}}, {"Mesa": {"attention": True}}],
    "WtaCrs": [{"WtaCrs": {}}],
    "FusedOps + WtaCrs": [{"FusedOps": {}}, {"WtaCrs": {}}],
    "FusedOps + Mesa + WtaCrs": [{"FusedOps": {}}, {"Mesa": {}}, {"WtaCrs": {}}],
    "Lora": [{"Lora": {}}],
    "Lora + Checkpointing": [{"Lora": {}}, {"Checkpointing": {}}],
    "Lora + FusedOps": [{"Lora": {}}, {"FusedOps": {}}],
    "Lora + FusedOps + Mesa, attention": [{"Lora": {}}, {"FusedOps": {}}, {"Mesa": {"attention": True}}],
}


def stepper(model: str, methods: list[dict[str, Any]]):
    """Forward and backward of the model under the recipe."""
    import transformers as hf

    import tightfit

    settings = MODELS[model]
    torch.manual_seed(0)
    if settings["family"] == "bert":
        config = hf.BertConfig(num_hidden_layers=settings["layers"])
        made: Any = hf.BertForSequenceClassification(config)
    else:
        size = {"hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8}
        made = hf.LlamaForCausalLM(hf.LlamaConfig(**size, num_hidden_layers=settings["layers"], vocab_size=32_000))
    applied = tightfit.apply(made.train(), tightfit.Recipe.from_list(methods))
    rows, length = settings["batch"]
    ids = torch.randint(5, 30_000, (rows, length))
    labels = torch.randint(0, 2, (rows,)) if settings["family"] == "bert" else ids
    return forward_backward(applied, {"input_ids": ids, "labels": labels})


def run() -> list[dict[str, Any]]:
    """One row per model and recipe; resumes."""
    rows = record.rows(NAME)
    done = {(row["model"], row["recipe"]) for row in rows}
    for model, name in itertools.product(MODELS, RECIPES):
        if (model, name) not in done:
            pair = [functools.partial(stepper, model, methods) for methods in ([], RECIPES[name])]
            rows.append({"model": model, "recipe": name, **measured_in_pairs(*pair, PAIRS, ROUNDS)})
            print(rows[-1], flush=True)
            record.write(NAME, {"pairs": PAIRS, "rounds": ROUNDS, "models": MODELS, "recipes": RECIPES}, rows)
    return rows
