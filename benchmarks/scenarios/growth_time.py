"""How the time of a step grows with the work: forward and backward of Llamas, one dimension at a time.

A small and a large model take turns, each in a process of its own with one thread, timed by CPU time.
"""

from __future__ import annotations

import functools
from typing import Any

import record
import torch
from growth import llama
from recipes import MAIN
from turns import forward_backward, measured, process

NAME = "growth_time"
QUICK = False
ROUNDS = 3
BASE = {"blocks": 4, "width": 256, "rows": 2, "length": 256, "vocabulary": 1_000}
SIZES: dict[str, tuple[int, int]] = {
    "blocks": (4, 16),
    "width": (256, 1024),
    "rows": (2, 8),
    "length": (256, 1024),
    "vocabulary": (8_000, 32_000),
}
CHOSEN = (
    *("stock", "Checkpointing", "FusedOps", "FusedOps + Mesa, attention", "WtaCrs", "TokenTune 0.2", "Lora"),
    *("Lora + Checkpointing", "Lora + Reversible", "LadderSide"),
)


def stepper(sizes: dict[str, int], methods: list[dict[str, Any]]):
    """Forward and backward of the model of these sizes under the recipe."""
    import tightfit
    from tightfit.core.simulate import example_batch

    torch.manual_seed(0)
    model = llama(sizes)
    batch = example_batch(model, sizes["rows"], sizes["length"], padded=False)
    return forward_backward(tightfit.apply(model, tightfit.Recipe.from_list(methods)), batch)


def run() -> list[dict[str, Any]]:
    """One row per recipe and dimension: the large model's time as a multiple of the small one's; resumes."""
    config = {"rounds": ROUNDS, "base": BASE, "sizes": SIZES, "recipes": {name: MAIN[name] for name in CHOSEN}}
    rows = record.rows(NAME, config)
    done = {(row["recipe"], row["dimension"]) for row in rows}
    for recipe in CHOSEN:
        for dimension, (small, large) in SIZES.items():
            if (recipe, dimension) in done:
                continue
            first, second = (
                functools.partial(stepper, {**BASE, dimension: size}, MAIN[recipe]) for size in (small, large)
            )
            with process(first) as ours, process(second) as other:
                rows.append({"recipe": recipe, "dimension": dimension, **measured(ours, other, ROUNDS)})
            print(rows[-1], flush=True)
            record.write(NAME, config, rows)
    return rows
