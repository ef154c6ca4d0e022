"""TokenTune's steps: time against stock on the CPU, and planned bytes beside Checkpointing.

Times are forward and backward, as `turns` takes them. Bytes are planned on models without weights, so they are the same
on every machine; peaks are above the weights and the optimizer's state.
"""

from __future__ import annotations

import functools
from typing import Any

import record
import torch
from recipes import ATTENTION, CHECKPOINTING, FUSED, LORA
from turns import forward_backward, measured, process

NAME = "token_tune"
QUICK = False
ROUNDS = 5
MODELS: dict[str, dict[str, Any]] = {
    "BERT-base, 8 x 256": {"family": "bert", "layers": 12, "width": 768, "batch": (8, 256)},
    "Llama 8 x 768, vocabulary 32,000, 2 x 1024": {"family": "llama", "layers": 8, "width": 768, "batch": (2, 1024)},
}
GROUPED = "Llama 8 x 768, 4 queries per key, vocabulary 32,000, 2 x 1024"
PLANNED = {**MODELS, GROUPED: {**MODELS["Llama 8 x 768, vocabulary 32,000, 2 x 1024"], "kv_heads": 3}}


def tokens(ratio: float, **fields: Any) -> list[dict[str, Any]]:
    """TokenTune as a recipe's line."""
    return [{"TokenTune": {"ratio": ratio, **fields}}]


CODED = [*FUSED, *ATTENTION]
TIMED: dict[str, list[dict[str, Any]]] = {
    "TokenTune 0.1": tokens(0.1),
    "TokenTune 0.2": tokens(0.2),
    "TokenTune 0.3": tokens(0.3),
    "TokenTune 0.3, suffix": tokens(0.3, policy="suffix", schedule="suffix"),
    "Checkpointing": CHECKPOINTING,
    "Lora": LORA,
    "Lora + TokenTune 0.2": LORA + tokens(0.2),
    "Lora + Checkpointing": LORA + CHECKPOINTING,
    "Lora + TokenTune 0.2 + Checkpointing": LORA + tokens(0.2) + CHECKPOINTING,
    "Lora + TokenTune 0.2, by block, + Checkpointing": LORA + tokens(0.2, schedule="block") + CHECKPOINTING,
}
SAVED: dict[str, list[dict[str, Any]]] = {
    "stock": [],
    "FusedOps": [{"FusedOps": {}}],
    "TokenTune 0.1": tokens(0.1),
    "TokenTune 0.2": tokens(0.2),
    "TokenTune 0.3": tokens(0.3),
    "TokenTune 0.2 + FusedOps": tokens(0.2) + CODED[:1],
    "TokenTune 0.2 + FusedOps + Mesa, attention": tokens(0.2) + CODED,
    "TokenTune 0.2, by block, + FusedOps + Mesa, attention": tokens(0.2, schedule="block") + CODED,
    "Checkpointing": CHECKPOINTING,
    "TokenTune 0.2 + Checkpointing": tokens(0.2) + CHECKPOINTING,
    "Lora": LORA,
    "Lora + Checkpointing": LORA + CHECKPOINTING,
    "Lora + TokenTune 0.2": LORA + tokens(0.2),
    "Lora + TokenTune 0.2 + FusedOps + Mesa, attention": LORA + tokens(0.2) + CODED,
    "Lora + TokenTune 0.2 + Checkpointing": LORA + tokens(0.2) + CHECKPOINTING,
    "Lora + TokenTune 0.2, by block, + Checkpointing": LORA + tokens(0.2, schedule="block") + CHECKPOINTING,
}


def config_of(settings: dict[str, Any]) -> Any:
    """The model's config."""
    import transformers as hf

    width, layers = settings["width"], settings["layers"]
    heads = max(1, width // 64)
    if settings["family"] == "bert":
        size = {"hidden_size": width, "num_attention_heads": heads, "intermediate_size": 4 * width}
        return hf.BertConfig(
            **size, num_hidden_layers=layers, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
    return hf.LlamaConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=settings.get("kv_heads", heads),
        intermediate_size=8 * width // 3,
        vocab_size=32_000,
        use_cache=False,
    )


def task_of(settings: dict[str, Any]) -> str:
    return "sequence-classification" if settings["family"] == "bert" else "causal-lm"


def stepper(settings: dict[str, Any], methods: list[dict[str, Any]]):
    """Forward and backward of the model under the recipe."""
    import transformers as hf

    import tightfit

    torch.manual_seed(0)
    config = config_of(settings)
    made = hf.BertForSequenceClassification if settings["family"] == "bert" else hf.LlamaForCausalLM
    applied = tightfit.apply(made(config).train(), tightfit.Recipe.from_list(methods))
    rows, length = settings["batch"]
    ids = torch.randint(5, 30_000, (rows, length))
    labels = torch.randint(0, 2, (rows,)) if settings["family"] == "bert" else ids
    return forward_backward(applied, {"input_ids": ids, "labels": labels})


def planned(settings: dict[str, Any], methods: list[dict[str, Any]]) -> dict[str, int]:
    """Bytes of a planned step."""
    import tightfit

    model = tightfit.skeleton(config_of(settings), task=task_of(settings))
    found = tightfit.plan(model, tightfit.Recipe.from_list(methods), batch=settings["batch"])
    static = found.by_category["weights"] + found.by_category["optimizer"]
    return {"saved_bytes": found.simulation.saved_bytes, "peak_bytes": found.peak_bytes - static}


def run(
    models: dict[str, dict[str, Any]] = MODELS,
    shapes: dict[str, dict[str, Any]] = PLANNED,
    rounds: int = ROUNDS,
    name: str = NAME,
) -> list[dict[str, Any]]:
    """One row per model and recipe, planned ones first; resumes."""
    config = {"rounds": rounds, "models": models, "planned": shapes, "timed": TIMED, "saved": SAVED}
    rows = record.rows(name, config)
    done = {(row.get("model"), row.get("timed_model"), row["recipe"]) for row in rows}
    for title, settings in shapes.items():
        for recipe, methods in SAVED.items():
            if (title, None, recipe) not in done:
                rows.append({"model": title, "recipe": recipe, **planned(settings, methods)})
                record.write(name, config, rows)
                print(rows[-1], flush=True)
    for title, settings in models.items():
        wanted = [r for r in TIMED if (None, title, r) not in done]
        if settings["family"] == "bert":
            wanted = [r for r in wanted if "suffix" not in r]
        if not wanted:
            continue
        with process(functools.partial(stepper, settings, [])) as stock:
            for recipe in wanted:
                with process(functools.partial(stepper, settings, TIMED[recipe])) as other:
                    rows.append({"timed_model": title, "recipe": recipe, **measured(stock, other, rounds)})
                record.write(name, config, rows)
                print(rows[-1], flush=True)
    return rows
