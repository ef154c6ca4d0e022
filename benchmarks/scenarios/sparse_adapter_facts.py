"""A table of facts that a small adapter cannot hold: SparseAdapter on a frozen Llama, beside dense adapters.

A fact is a key of three random tokens with a value of four; the model, stories260k, has seen none of them and stays
frozen. After training, a fact counts as known when all four tokens of its value come out right, one after the other.
The dense adapters are plain ReLU layers beside the same MLPs, trained by the same optimizer: one as wide as the sparse
adapter, one with as many rows as the sparse one may have on the device at once. Needs the folder of models beside the
project.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import record
import torch

NAME = "sparse_adapter_facts"
QUICK = False
SEEDS = (0, 1, 2)
KEY, VALUE = 3, 4
SETTINGS: dict[str, Any] = {
    "facts": 2048,
    "layers": [3, 4],
    "batch_size": 4,
    "epochs": 20,
    "learning_rate": 1.0e-3,
    "sparse_learning_rate": 1.0e-5,
    "wide": 16384,
    "narrow": 256,
    "top_k": 8,
    "groups": 1,
    "scale": 1.0e4,
}
ADAPTERS = ("sparse", "dense, as wide", "dense, as many rows as on the device")


class Dense(torch.nn.Module):
    """ReLU(x K^T) V beside an MLP; it begins at zero as SparseAdapter does."""

    def __init__(self, rows: int, size: int):
        super().__init__()
        self.keys = torch.nn.Parameter(torch.randn(rows, size) * size**-0.5)
        self.values = torch.nn.Parameter(torch.zeros(rows, size))

    def forward(self, mlp: Any, given: tuple[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
        return out + torch.relu(given[0] @ self.keys.T) @ self.values


def adapted(model: Any, name: str, seed: int, settings: dict[str, Any]) -> tuple[Any, Any, Callable[[], Any]]:
    """(parameters to clip, optimizer, what to report) of a model with its adapter."""
    import tightfit

    rate, wide, narrow = settings["learning_rate"], settings["wide"], settings["narrow"]
    if name == "sparse":
        rate = settings["sparse_learning_rate"]
        fields = {key: settings[key] for key in ("top_k", "groups", "scale")}
        where = "|".join(f"model.layers.{layer}.mlp" for layer in settings["layers"])
        transform = tightfit.SparseAdapter(width=wide, max_resident=narrow, seed=seed, where=where, **fields)
        applied = tightfit.apply(model, transform)
        optimizer = applied.optimizer(torch.optim.AdamW, lr=rate, weight_decay=0.0)
        return list(applied.parameters()), optimizer, lambda: applied.report()["methods"]["SparseAdapter"]
    model.requires_grad_(False)
    rows = wide if name == "dense, as wide" else narrow
    layers = [Dense(rows, model.config.hidden_size) for _ in settings["layers"]]
    for layer, block in zip(layers, settings["layers"]):
        model.model.layers[block].mlp.register_forward_hook(layer)
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    return parameters, torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, fused=True), dict


def table(facts: int, vocabulary: int, seed: int) -> torch.Tensor:
    """(facts, KEY + VALUE) token ids; no key comes twice."""
    draw = torch.Generator().manual_seed(seed)
    keys = torch.randperm(vocabulary**KEY, generator=draw)[:facts]
    digits = [keys // vocabulary**place % vocabulary for place in range(KEY)]
    return torch.cat([torch.stack(digits, 1), torch.randint(vocabulary, (facts, VALUE), generator=draw)], 1)


def fact_row(name: str, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Train one adapter and ask for every fact."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(record.SHARED / "models" / "stories260k").train()
    facts = table(settings["facts"], 128, seed) + 259  # tokens that stand for themselves, not for bytes or marks
    parameters, optimizer, report = adapted(model, name, seed, settings)
    size, epochs = settings["batch_size"], settings["epochs"]
    steps = epochs * (len(facts) // size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, step / 100) * (1 - step / steps))
    for _ in range(epochs):
        for rows in facts[torch.randperm(len(facts))].split(size):
            labels = rows.clone()
            labels[:, :KEY] = -100
            model(input_ids=rows, labels=labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    found = report()
    return {"adapter": name, "seed": seed, "known": known(model.eval(), facts, size), "report": found}


def known(model: Any, facts: torch.Tensor, size: int) -> float:
    """Share of the facts whose whole value comes out; asked `size` at a time, as the device holds rows for no more."""
    right = 0
    for rows in facts.split(size):
        with torch.no_grad():
            found = model.generate(
                input_ids=rows[:, :KEY],
                attention_mask=torch.ones_like(rows[:, :KEY]),
                max_new_tokens=VALUE,
                min_new_tokens=VALUE,
                do_sample=False,
                pad_token_id=0,
            )
        right += int((found[:, KEY:] == rows[:, KEY:]).all(1).sum())
    return right / len(facts)


def run(settings: dict[str, Any] = SETTINGS, seeds: tuple[int, ...] = SEEDS) -> list[dict[str, Any]]:
    """One row per adapter and seed; the next call goes on."""
    torch.set_num_threads(1)
    earlier = record.read(NAME)
    rows = earlier["rows"] if earlier and earlier["config"] == settings else []
    done = {(row["adapter"], row["seed"]) for row in rows}
    for seed, name in itertools.product(seeds, ADAPTERS):
        if (name, seed) not in done:
            rows.append(fact_row(name, seed, settings))
            print({key: rows[-1][key] for key in ("adapter", "seed", "known")}, flush=True)
            record.write(NAME, settings, rows)
    return rows
