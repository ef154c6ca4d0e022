"""How the memory of a step grows with the work: planned bytes of Llamas, one dimension at a time.

Peaks are of forward and backward above weights and batch, without weights in memory. Time is not in it.
"""

from __future__ import annotations

from typing import Any

import record
import torch
from recipes import LORA, MAIN

NAME = "growth"
QUICK = False
BASE = {"blocks": 8, "width": 512, "rows": 4, "length": 256, "vocabulary": 8_000}
SIZES: dict[str, tuple[int, ...]] = {
    "blocks": (4, 8, 16, 32),
    "width": (256, 512, 1024, 2048),
    "rows": (2, 4, 8, 16),
    "length": (128, 256, 512, 1024),
    "vocabulary": (4_000, 8_000, 16_000, 32_000),
}
RECIPES: dict[str, list[Any]] = MAIN | {
    "PartialEmbedding of 2,000": [{"PartialEmbedding": {"ids": list(range(2000))}}],
    "Lora + Velora": [*LORA, {"Velora": {"where": "*"}}],
    "Sherl": [{"Sherl": {}}],
}
THEORY = {
    "Checkpointing": 1.0,
    "FusedOps + Checkpointing": 1.0,
    "Lora + Checkpointing": 1.0,
    "Lora + Reversible": 4 / 32,
    "Lora + FusedOps + Reversible": 4 / 32,
}
"""What a further block keeps by the methods' equations: of its input, 4-byte numbers of each; a block's input, or k=4
bits of each."""


def llama(sizes: dict[str, int]) -> Any:
    """A model of these sizes, in training mode."""
    import transformers as hf

    width = sizes["width"]
    config = hf.LlamaConfig(
        num_hidden_layers=sizes["blocks"],
        hidden_size=width,
        intermediate_size=11 * width // 4,
        num_attention_heads=max(1, width // 64),
        vocab_size=sizes["vocabulary"],
    )
    return hf.LlamaForCausalLM(config).train()


def planned(sizes: dict[str, int], methods: list[Any]) -> dict[str, int]:
    """Bytes of a step of forward and backward."""
    import tightfit

    with torch.device("meta"):
        model = llama(sizes)
    recipe, size = tightfit.Recipe.from_list(methods), (sizes["rows"], sizes["length"])
    found = tightfit.plan(model, recipe, batch=size, optimizer="sgd")
    step = found.simulation
    return {
        "peak_bytes": step.pass_bytes - step.static_bytes,
        "saved_bytes": step.saved_bytes,
        "trainable": found.trainable_parameters,
    }


def run() -> list[dict[str, Any]]:
    """One row per recipe, dimension and size; resumes."""
    config = {"base": BASE, "sizes": SIZES, "theory": THEORY, "recipes": RECIPES}
    rows = record.rows(NAME, config)
    done = {(row["recipe"], row["dimension"], row["size"]) for row in rows}
    for recipe, methods in RECIPES.items():
        for dimension, sizes in SIZES.items():
            for size in sizes:
                if (recipe, dimension, size) in done:
                    continue
                figures = planned({**BASE, dimension: size}, methods)
                rows.append({"recipe": recipe, "dimension": dimension, "size": size, **figures})
                record.write(NAME, config, rows)
        print(rows[-1], flush=True)
    return rows
