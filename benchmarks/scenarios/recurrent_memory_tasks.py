"""Copying and reversing across six segments: a small decoder from scratch, which must carry all in its memory.

A row is a source of digits over its first half and the target over its second one; segments see nothing of each other
but the memory. Training begins with rows of two segments and goes on with longer ones when these are solved. Beside it
the same model without memory tokens. Accuracy is the share of right target digits, each after the right ones before it.
"""

from __future__ import annotations

import time
from typing import Any

import record
import torch

NAME = "recurrent_memory_tasks"
QUICK = False
SEEDS = (0, 1, 2)
TASKS = ("copy", "reverse")
MEMORY = {"9 memory tokens": 9, "no memory": 0}
SETTINGS: dict[str, Any] = {
    "segment": 3,
    "stages": [2, 4, 6],
    "solved": [0.99, 0.99, 0.997],
    "digits": 10,
    "rows": 32,
    "width": 64,
    "layers": 2,
    "heads": 4,
    "learning_rate": 2e-3,
    "warm_up": 50,
    "cool_down": 0.2,
    "every": 100,
    "steps": 3000,
    "steps_without": 800,
    "held_out": 1024,
}


def rows_of(task: str, segments: int, count: int, settings: dict[str, Any], generator: torch.Generator):
    """Ids (count, tokens), and labels of the second half."""
    half = segments * settings["segment"] // 2
    source = torch.randint(settings["digits"], (count, half), generator=generator)
    ids = torch.cat([source, source if task == "copy" else source.flip(1)], 1)
    labels = ids.clone()
    labels[:, :half] = -100
    return ids, labels


@torch.no_grad()
def accuracy(model: Any, ids: torch.Tensor) -> float:
    """Share of right digits in the second half."""
    model.eval()
    half = ids.shape[1] // 2
    found = model(input_ids=ids).logits[:, half - 1 : -1].argmax(-1)
    model.train()
    return float((found == ids[:, half:]).float().mean())


def decoder(settings: dict[str, Any], tokens: int) -> Any:
    """A fresh GPT-2 of the settings' size."""
    import transformers as hf

    config = hf.GPT2Config(
        n_embd=settings["width"],
        n_layer=settings["layers"],
        n_head=settings["heads"],
        n_positions=settings["segment"] + 2 * tokens,
        vocab_size=settings["digits"],
        bos_token_id=None,
        eos_token_id=None,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
    )
    return hf.GPT2LMHeadModel(config).train()


def trained(task: str, tokens: int, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Train through the stages; accuracy on fresh rows of the last one."""
    import tightfit

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = decoder(settings, tokens)
    applied = tightfit.apply(model, tightfit.RecurrentMemory(tokens=tokens, segment=settings["segment"], seed=seed))
    rate = settings["learning_rate"]
    optimizer = applied.optimizer(torch.optim.AdamW, lr=rate, weight_decay=0.0, betas=(0.9, 0.98))
    generator = torch.Generator().manual_seed(seed)
    limit = settings["steps" if tokens else "steps_without"]
    reached, steps, start = [], 0, time.process_time()
    for segments, solved in zip(settings["stages"], settings["solved"]):
        begun = steps
        while (left := 1 - steps / limit) > 0:
            steps += 1
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (steps - begun) / settings["warm_up"], left / settings["cool_down"])
            ids, labels = rows_of(task, segments, settings["rows"], settings, generator)
            model(input_ids=ids, labels=labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(applied.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if steps % settings["every"] == 0:
                now = accuracy(model, rows_of(task, segments, 256, settings, generator)[0])
                if now >= solved:
                    break
        reached.append(steps)
    ids, _ = rows_of(task, settings["stages"][-1], settings["held_out"], settings, generator)
    return {
        "accuracy": accuracy(model, ids),
        "steps": reached,
        "cpu_seconds": time.process_time() - start,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def run(
    settings: dict[str, Any] = SETTINGS,
    seeds: tuple[int, ...] = SEEDS,
    tasks: tuple[str, ...] = TASKS,
    name: str = NAME,
) -> list[dict[str, Any]]:
    """One row per task, memory and seed; resumes."""
    config = {"settings": settings, "memory": MEMORY}
    rows = record.rows(name, config)
    done = {(row["task"], row["memory"], row["seed"]) for row in rows}
    for task in tasks:
        for memory, tokens in MEMORY.items():
            for seed in seeds:
                if (task, memory, seed) in done:
                    continue
                found = trained(task, tokens, seed, settings)
                rows.append({"task": task, "memory": memory, "seed": seed, **found})
                record.write(name, config, rows)
                print(rows[-1], flush=True)
    return rows
