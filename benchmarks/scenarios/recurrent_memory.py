"""Peak memory and time of RecurrentMemory's steps against the number of segments: replayed, and stored.

Peaks are above the weights. The planned ones need no weights and are the same on every machine; the measured ones are
the allocator's. Seconds are those of forward and backward in the CPU time of a process with one thread.
"""

from __future__ import annotations

import functools
import statistics
from typing import Any

import record
import torch
from turns import forward_backward, process

NAME = "recurrent_memory"
QUICK = False
SEGMENTS = (1, 2, 4, 8, 16, 32)
STORED_UP_TO = 8
SETTINGS: dict[str, Any] = {
    "width": 256,
    "layers": 4,
    "vocabulary": 8000,
    "rows": 4,
    "segment": 128,
    "tokens": 10,
    "rounds": 3,
}
RECIPES: dict[str, list[dict[str, Any]]] = {
    "replay": [{"RecurrentMemory": {}}],
    "stored": [{"RecurrentMemory": {"replay": False}}],
    "replay + FusedOps": [{"RecurrentMemory": {}}, {"FusedOps": {}}],
    "Lora + replay + FusedOps": [{"Lora": {}}, {"RecurrentMemory": {}}, {"FusedOps": {}}],
}


def recipe_of(name: str, settings: dict[str, Any]) -> Any:
    """The recipe with the settings' sizes."""
    import tightfit

    sizes = {"tokens": settings["tokens"], "segment": settings["segment"]}
    methods = [{k: {**v, **(sizes if k == "RecurrentMemory" else {})} for k, v in m.items()} for m in RECIPES[name]]
    return tightfit.Recipe.from_list(methods)


def config_of(settings: dict[str, Any]) -> Any:
    """The model's config."""
    import transformers as hf

    return hf.LlamaConfig(
        hidden_size=settings["width"],
        intermediate_size=8 * settings["width"] // 3,
        num_hidden_layers=settings["layers"],
        num_attention_heads=4,
        vocab_size=settings["vocabulary"],
        max_position_embeddings=2 * settings["segment"],
        use_cache=False,
    )


def made(recipe: str, settings: dict[str, Any]) -> Any:
    """The model under the recipe."""
    import transformers as hf

    import tightfit

    torch.set_num_threads(1)
    torch.manual_seed(0)
    return tightfit.apply(hf.LlamaForCausalLM(config_of(settings)).train(), recipe_of(recipe, settings))


def batch_of(segments: int, settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Rows of that many segments."""
    ids = torch.randint(settings["vocabulary"], (settings["rows"], segments * settings["segment"]))
    return {"input_ids": ids, "labels": ids}


def stepper(recipe: str, segments: int, settings: dict[str, Any]):
    """Forward and backward."""
    return forward_backward(made(recipe, settings), batch_of(segments, settings))


def planned(recipe: str, segments: int, settings: dict[str, Any]) -> int:
    """Bytes of the peak above the weights."""
    import tightfit

    model = tightfit.skeleton(config_of(settings), task="causal-lm")
    found = tightfit.plan(model, recipe_of(recipe, settings), batch=batch_of(segments, settings), optimizer="sgd")
    return found.peak_bytes - found.by_category["weights"]


def measured(recipe: str, segments: int, settings: dict[str, Any]) -> dict[str, Any]:
    """The allocator's peak above the weights and the batch's time."""
    import tightfit

    applied = made(recipe, settings)
    step = forward_backward(applied, batch_of(segments, settings))
    step()
    weights = sum(p.nbytes for p in applied.model.parameters())
    peak = tightfit.measure(step).peak_bytes - weights
    with process(functools.partial(stepper, recipe, segments, settings)) as run:
        seconds = [run()[0] for _ in range(settings["rounds"] + 1)][1:]
    return {"measured_peak_bytes": peak, "seconds": statistics.median(seconds)}


def run(
    settings: dict[str, Any] = SETTINGS,
    segments: tuple[int, ...] = SEGMENTS,
    stored_up_to: int = STORED_UP_TO,
    name: str = NAME,
) -> list[dict[str, Any]]:
    """One row per recipe and number of segments; resumes."""
    config = {"settings": settings, "recipes": RECIPES, "segments": segments, "stored_up_to": stored_up_to}
    rows = record.rows(name, config)
    done = {(row["recipe"], row["segments"]) for row in rows}
    for count in segments:
        for recipe in RECIPES:
            if (recipe, count) in done or (recipe == "stored" and count > stored_up_to):
                continue
            found = {"planned_peak_bytes": planned(recipe, count, settings), **measured(recipe, count, settings)}
            rows.append({"recipe": recipe, "segments": count, **found})
            record.write(name, config, rows)
            print(rows[-1], flush=True)
    return rows
