"""Reversible beside Checkpointing: the peak of forward and backward over 32 blocks, and step times.

Peaks are planned on a model without weights and measured on a real one. Times are CPU times of processes that take
turns, each recipe against checkpointing under the same other methods.
"""

from __future__ import annotations

import functools
from typing import Any

import record
import torch
from recipes import ATTENTION, CHECKPOINTING, FUSED, LORA
from turns import forward_backward, measured_in_pairs

NAME = "reversible"
QUICK = False
REVERSIBLE: list[dict[str, Any]] = [{"Reversible": {}}]
RECIPES: dict[str, list[dict[str, Any]]] = {
    "stock": [],
    "Checkpointing": CHECKPOINTING,
    "Reversible": REVERSIBLE,
    "Lora": LORA,
    "Lora + Checkpointing": [*LORA, *CHECKPOINTING],
    "Lora + Reversible": [*LORA, *REVERSIBLE],
    "Lora + Reversible(k=1)": [*LORA, {"Reversible": {"k": 1}}],
    "Lora + Reversible(tiles=1)": [*LORA, {"Reversible": {"tiles": 1}}],
    "Lora + FusedOps + Checkpointing": [*LORA, *FUSED, *CHECKPOINTING],
    "Lora + FusedOps + Reversible": [*LORA, *FUSED, *REVERSIBLE],
    "Lora + FusedOps + Mesa + Reversible": [*LORA, *FUSED, *ATTENTION, *REVERSIBLE],
}
TIMED: dict[str, str] = {
    "Reversible": "Checkpointing",
    "Lora + Reversible": "Lora + Checkpointing",
    "Lora + FusedOps + Reversible": "Lora + FusedOps + Checkpointing",
}
LLAMA: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_attention_heads": 8,
    "vocab_size": 1000,
}
SETTINGS: dict[str, Any] = {
    "llama": LLAMA,
    "blocks": (8, 32),
    "timed_blocks": 6,
    "batch": (4, 256),
    "pairs": 3,
    "rounds": 7,
}


def build(settings: dict[str, Any], blocks: int, weights: bool):
    """A Llama of so many blocks."""
    import transformers as hf

    torch.manual_seed(0)
    with torch.device("cpu" if weights else "meta"):
        return hf.LlamaForCausalLM(hf.LlamaConfig(**settings["llama"], num_hidden_layers=blocks)).train()


def stepper(settings: dict[str, Any], methods: list[dict[str, Any]], blocks: int):
    """Forward and backward of a real model under a recipe."""
    import tightfit
    from tightfit.core.simulate import example_batch

    model = build(settings, blocks, weights=True)
    batch = example_batch(model, *settings["batch"], padded=False)
    applied = tightfit.apply(model, tightfit.Recipe.from_list(methods))
    return forward_backward(applied, batch)


def planned(settings: dict[str, Any], methods: list[dict[str, Any]], blocks: int) -> dict[str, int]:
    """Peak of forward and backward above the weights, and bytes kept, from a simulation."""
    import tightfit
    from tightfit.core.simulate import example_batch, simulate

    model = build(settings, blocks, weights=False)
    batch = example_batch(model, *settings["batch"], padded=False)
    applied = tightfit.apply(model, tightfit.Recipe.from_list(methods))
    found = simulate(applied.model, batch, optimizer="sgd", extrapolate=False)
    return {"planned_peak_bytes": found.pass_bytes - found.static_bytes, "saved_bytes": found.saved_bytes}


def real_peak(settings: dict[str, Any], methods: list[dict[str, Any]], blocks: int) -> int:
    """The allocator's peak of forward and backward above what was there before."""
    from tightfit.core.memory import allocator_peak, live_bytes

    step = stepper(settings, methods, blocks)
    step()
    return allocator_peak(step) - live_bytes()


def _place(row: dict[str, Any]) -> tuple[float, int]:
    return row.get("blocks", float("inf")), list(RECIPES).index(row["recipe"])


def run(settings: dict[str, Any] = SETTINGS, name: str = NAME) -> list[dict[str, Any]]:
    """Rows with `blocks` hold peaks, rows with `against` times; resumes."""
    torch.set_num_threads(1)
    config = {**settings, "recipes": RECIPES}
    rows = record.rows(name, config)
    done = {(row.get("blocks"), row["recipe"]) for row in rows}
    for blocks in settings["blocks"]:
        for recipe, methods in RECIPES.items():
            if (blocks, recipe) in done:
                continue
            figures = planned(settings, methods, blocks)
            row = {"blocks": blocks, "recipe": recipe, **figures, "peak_bytes": real_peak(settings, methods, blocks)}
            rows.append(row)
            rows.sort(key=_place)
            print(row, flush=True)
            record.write(name, config, rows)
    for recipe, against in TIMED.items():
        if (None, recipe) in done:
            continue
        pair = [functools.partial(stepper, settings, RECIPES[r], settings["timed_blocks"]) for r in (against, recipe)]
        times = measured_in_pairs(*pair, settings["pairs"], settings["rounds"])
        row = {"against": against, "recipe": recipe, **times}
        rows.append(row)
        print(row, flush=True)
        record.write(name, config, rows)
    return rows
