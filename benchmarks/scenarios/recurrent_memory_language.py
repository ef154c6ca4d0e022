"""Memory tokens on a language model: a small decoder from scratch on WikiText-2, in segments of 50 tokens.

Perplexity per token on the test text, without memory and with ten memory tokens whose gradients go back through 0, 1
and 2 segments. The shared data hold WikiText-2's validation and test parts only: the first is what the model trains on.
Tokens are those of the stories260k model, 512 of them. Needs the folder of models and data beside the project.
"""

from __future__ import annotations

import gzip
import math
import time
from typing import Any

import record
import torch

NAME = "recurrent_memory_language"
QUICK = False
SEEDS = (0, 1, 2)
RECIPES: dict[str, dict[str, Any]] = {
    "no memory": {"tokens": 0},
    "10 tokens, depth 0": {"tokens": 10, "bptt": "none"},
    "10 tokens, depth 1": {"tokens": 10, "bptt": "block:1"},
    "10 tokens, depth 2": {"tokens": 10, "bptt": "block:2"},
}
SETTINGS: dict[str, Any] = {
    "segment": 50,
    "segments": 6,
    "rows": 8,
    "width": 96,
    "layers": 3,
    "heads": 4,
    "steps": 600,
    "warm_up": 50,
    "learning_rate": 2e-3,
    "held_out": 200,
    "cpu_seconds": 360,
}


def texts(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows to train on, rows to test on), each (N, length) ids."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(record.SHARED / "models" / "stories260k")

    def rows(part: str) -> torch.Tensor:
        text = gzip.decompress((record.SHARED / "data" / "wikitext2" / f"{part}.txt.gz").read_bytes()).decode()
        ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
        return ids[: len(ids) // length * length].view(-1, length)

    return rows("valid"), rows("test")


def decoder(settings: dict[str, Any]) -> Any:
    """A fresh Llama of the settings' size."""
    import transformers as hf

    config = hf.LlamaConfig(
        hidden_size=settings["width"],
        intermediate_size=8 * settings["width"] // 3,
        num_hidden_layers=settings["layers"],
        num_attention_heads=settings["heads"],
        vocab_size=512,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return hf.LlamaForCausalLM(config).train()


@torch.no_grad()
def perplexity(model: Any, rows: torch.Tensor) -> float:
    """exp of the mean loss per token."""
    model.eval()
    losses = [float(model(input_ids=part, labels=part).loss) * len(part) for part in rows.split(20)]
    model.train()
    return math.exp(sum(losses) / len(rows))


def trained(fields: dict[str, Any], seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Train for the settings' steps, or until the CPU time is over."""
    import tightfit

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    data, test = texts(settings["segment"] * settings["segments"])
    model = decoder(settings)
    applied = tightfit.apply(model, tightfit.RecurrentMemory(segment=settings["segment"], seed=seed, **fields))
    optimizer = applied.optimizer(torch.optim.AdamW, lr=settings["learning_rate"], weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    steps, start = 0, time.process_time()
    while steps < settings["steps"] and time.process_time() - start < settings["cpu_seconds"]:
        rate = min(1.0, (steps + 1) / settings["warm_up"]) * max(0.05, 1 - steps / settings["steps"])
        for group in optimizer.param_groups:
            group["lr"] = settings["learning_rate"] * rate
        batch = data[torch.randint(len(data), (settings["rows"],), generator=generator)]
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(applied.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    return {
        "steps": steps,
        "cpu_seconds": time.process_time() - start,
        "perplexity": perplexity(model, test[: settings["held_out"]]),
        "train_perplexity": perplexity(model, data[: settings["held_out"]]),
    }


def run(settings: dict[str, Any] = SETTINGS, seeds: tuple[int, ...] = SEEDS, name: str = NAME) -> list[dict[str, Any]]:
    """One row per recipe and seed; resumes."""
    config = {"settings": settings, "recipes": RECIPES}
    rows = record.rows(name, config)
    done = {(row["recipe"], row["seed"]) for row in rows}
    for seed in seeds:
        for recipe, fields in RECIPES.items():
            if (recipe, seed) in done:
                continue
            rows.append({"recipe": recipe, "seed": seed, **trained(fields, seed, settings)})
            record.write(name, config, rows)
            print(rows[-1], flush=True)
    return rows
