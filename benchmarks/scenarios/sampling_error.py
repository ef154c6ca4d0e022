"""Error of sampled weight gradients against stock, one draw, on models of three blocks with random weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import record
import torch

NAME = "sampling_error"
QUICK = True
STEPS, LEARNING = 8, 3
RECIPES: dict[str, list[dict[str, Any]]] = {
    "WtaCrs()": [{"WtaCrs": {}}],
    'WtaCrs(mode="wta")': [{"WtaCrs": {"mode": "wta"}}],
    'WtaCrs(scores="running")': [{"WtaCrs": {"scores": "running"}}],
    "FusedOps(), WtaCrs(budget=0.1)": [{"FusedOps": {}}, {"WtaCrs": {"budget": 0.1}}],
    "FusedOps(), WtaCrs()": [{"FusedOps": {}}, {"WtaCrs": {}}],
    "FusedOps(), WtaCrs(budget=0.5)": [{"FusedOps": {}}, {"WtaCrs": {"budget": 0.5}}],
    "FusedOps(), Mesa(), WtaCrs()": [{"FusedOps": {}}, {"Mesa": {}}, {"WtaCrs": {}}],
}


def models() -> Iterator[tuple[str, Any, dict[str, torch.Tensor]]]:
    """(name, model, batch)"""
    import transformers as hf

    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    torch.manual_seed(0)
    bert = hf.BertForSequenceClassification(hf.BertConfig(num_hidden_layers=3, vocab_size=1000, **rates))
    ids = torch.randint(5, 1000, (16, 64))
    yield "BERT-base width, 16 x 64, classification", bert, {"input_ids": ids, "labels": torch.randint(0, 2, (16,))}
    size = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 3, "num_attention_heads": 8}
    llama = hf.LlamaForCausalLM(hf.LlamaConfig(**size, vocab_size=1000))
    ids = torch.randint(5, 1000, (4, 256))
    yield "Llama of width 512, 4 x 256, every token a target", llama, {"input_ids": ids, "labels": ids}


def gradients(model: Any, batch: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """Those of the weight matrices of the blocks."""
    torch.manual_seed(seed)
    model.zero_grad()
    model(**batch).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if "layer" in n and p.dim() == 2}


def run() -> list[dict[str, Any]]:
    """One row per model and recipe: the mean over the draws after `LEARNING` steps on the same batch."""
    import tightfit

    rows: list[dict[str, Any]] = []
    for name, model, batch in models():
        model.train()
        wanted = gradients(model, batch, 0)
        norm = sum(g.square().sum() for g in wanted.values())
        for recipe, methods in RECIPES.items():
            twin = tightfit.apply(copy.deepcopy(model), tightfit.Recipe.from_list(methods)).model
            errors = []
            for seed in range(STEPS):
                found = gradients(twin, batch, seed)
                errors.append(float((sum((found[n] - g).square().sum() for n, g in wanted.items()) / norm).sqrt()))
            late = errors[LEARNING:]
            rows.append({"model": name, "recipe": recipe, "error": sum(late) / len(late)})
            print(rows[-1], flush=True)
    record.write(NAME, {"steps": STEPS, "learning": LEARNING, "recipes": RECIPES}, rows)
    return rows
