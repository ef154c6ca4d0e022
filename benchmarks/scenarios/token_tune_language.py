"""TokenTune on a language model: a real small Llama, from stories to Shakespeare, held-out loss after training.

Beside full training for as many steps, and full training stopped at the CPU time that TokenTune took. Needs the folder
of models and data beside the project.
"""

from __future__ import annotations

import gzip
import time
from typing import Any

import record
import torch

NAME = "token_tune_language"
QUICK = False
SEEDS = (0, 1, 2)
SETTINGS: dict[str, Any] = {"steps": 600, "rows": 8, "length": 256, "learning_rate": 1e-3, "held_out": 64}
RECIPES: dict[str, list[dict[str, Any]]] = {
    "full": [],
    "TokenTune 0.3": [{"TokenTune": {"ratio": 0.3}}],
    "TokenTune 0.3, suffix": [{"TokenTune": {"ratio": 0.3, "policy": "suffix", "schedule": "suffix"}}],
    "TokenTune 0.3, blocks": [{"TokenTune": {"ratio": 0.3, "policy": "block"}}],
    "TokenTune 0.3, by score": [{"TokenTune": {"ratio": 0.3, "policy": "score"}}],
    "TokenTune 0.3, Bernoulli": [{"TokenTune": {"ratio": 0.3, "policy": "bernoulli", "normalise": "all"}}],
    "TokenTune 0.3, unbiased": [{"TokenTune": {"ratio": 0.3, "policy": "bernoulli", "unbiased": True}}],
    "Lora": [{"Lora": {}}],
    "Lora + TokenTune 0.3": [{"Lora": {}}, {"TokenTune": {"ratio": 0.3}}],
}
SAME_TIME = "full, in the CPU time of TokenTune 0.3"
MAIN = ("full", "TokenTune 0.3", SAME_TIME, "TokenTune 0.3, Bernoulli", "TokenTune 0.3, unbiased")
"""Recipes that come before the others."""


def windows(length: int) -> torch.Tensor:
    """(N, length) token ids of the whole text, each window with the first token of a text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(record.SHARED / "models" / "stories260k")
    text = gzip.decompress((record.SHARED / "data" / "tinyshakespeare" / "input.txt.gz").read_bytes()).decode()
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    body = ids[: len(ids) // (length - 1) * (length - 1)].view(-1, length - 1)
    return torch.cat([torch.full((len(body), 1), tokenizer.bos_token_id), body], 1)


@torch.no_grad()
def held_out_loss(model: Any, rows: torch.Tensor) -> float:
    model.eval()
    losses = [float(model(input_ids=part, labels=part).loss) * len(part) for part in rows.split(16)]
    model.train()
    return sum(losses) / len(rows)


def trained(
    methods: list[dict[str, Any]], seed: int, settings: dict[str, Any], seconds: float | None = None
) -> dict[str, Any]:
    """Train for the settings' steps, or for so many CPU seconds (of as many steps' schedule)."""
    from transformers import AutoModelForCausalLM

    import tightfit

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(record.SHARED / "models" / "stories260k").train()
    model.config.use_cache = False
    data = windows(settings["length"])
    held_out, rows = data[-settings["held_out"] :], data[: -settings["held_out"]]
    before = held_out_loss(model, held_out)
    recipe = tightfit.Recipe.from_list([{**m} for m in methods])
    applied = tightfit.apply(model, recipe)
    rate = settings["learning_rate"] * (5 if any("Lora" in m for m in methods) else 1)
    optimizer = applied.optimizer(torch.optim.AdamW, lr=rate, weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    steps, spent, start = 0, 0.0, time.process_time()
    while steps < settings["steps"] and (seconds is None or spent < seconds):
        progress = steps / settings["steps"] if seconds is None else spent / seconds
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (steps + 1) / 20) * max(0.05, 1 - progress)
        batch = rows[torch.randint(len(rows), (settings["rows"],), generator=generator)]
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(applied.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps, spent = steps + 1, time.process_time() - start
    return {"steps": steps, "cpu_seconds": spent, "before": before, "loss": held_out_loss(model, held_out)}


def run(settings: dict[str, Any] = SETTINGS, seeds: tuple[int, ...] = SEEDS, name: str = NAME) -> list[dict[str, Any]]:
    """One row per seed and recipe; resumes."""
    config = {"settings": settings, "recipes": RECIPES}
    rows = record.rows(name, config)
    for recipe in (*MAIN, *(recipe for recipe in RECIPES if recipe not in MAIN)):
        for seed in seeds:
            own = {row["recipe"]: row for row in rows if row["seed"] == seed}
            if recipe in own:
                continue
            seconds = own["TokenTune 0.3"]["cpu_seconds"] if recipe == SAME_TIME else None
            found = trained(RECIPES.get(recipe, []), seed, settings, seconds)
            rows.append({"recipe": recipe, "seed": seed, **found})
            record.write(name, config, rows)
            print(rows[-1], flush=True)
    return rows
