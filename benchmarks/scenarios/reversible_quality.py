"""Reversible against stock blocks: how near it begins, and what comes out of training.

At the beginning: a small Llama's predictions of the next token (KL to the stock model's), and the sentence vectors of
MiniLM. After training: the Llama from stories to Shakespeare, also as the plain model that an export gives. Real tasks
are in `quality`. Needs the folder of models and data beside the project.
"""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import record
import torch
import torch.nn.functional as F
from recipes import LORA
from token_tune_language import held_out_loss, windows

NAME = "reversible_quality"
QUICK = False
SEEDS = (0, 1, 2)
PUBLISHED: dict[str, Any] = {"variant": "meft1", "exact": False, "lam": 0.1, "allow_inexact": True}
START: dict[str, dict[str, Any]] = {
    "two steps, k = 2": {"k": 2},
    "two steps, k = 4": {"k": 4},
    "two steps, k = 6": {"k": 6},
    "meft1, exact, 2^-4": {"variant": "meft1"},
    "meft1, 0.1": PUBLISHED,
    "meft1, 0.1, mean": {**PUBLISHED, "merge": "mean"},
    "meft1, 0.1, weighted": {**PUBLISHED, "merge": "weighted"},
}
ADAPTED = {"variant": "meft1", "adapter_dim": 16, "merge": "weighted"}
RECIPES: dict[str, list[dict[str, Any]]] = {
    "full": [],
    "Reversible": [{"Reversible": {}}],
    "Reversible, annealed": [{"Reversible": {"anneal": 0.3}}],
    "Lora": LORA,
    "Lora + Reversible": [*LORA, {"Reversible": {}}],
    "Lora + Reversible, annealed": [*LORA, {"Reversible": {"anneal": 0.3}}],
    "Lora + Reversible, meft1": [*LORA, {"Reversible": {"variant": "meft1"}}],
    "adapters, meft1": [{"Reversible": ADAPTED}],
    "adapters, meft1 as published": [{"Reversible": {**PUBLISHED, **ADAPTED}}],
}
SETTINGS: dict[str, Any] = {
    "steps": 600,
    "rows": 8,
    "length": 256,
    "learning_rate": 1e-3,
    "held_out": 64,
    "sentences": 256,
}


def language_model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(record.SHARED / "models" / "stories260k")


def applied_to(model: Any, fields: dict[str, Any]):
    import tightfit

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is not exact says so
        return tightfit.apply(model, tightfit.Reversible(**fields))


@torch.no_grad()
def start_of_language(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """KL to the stock model per token, and the loss, on text the model was not trained on."""
    rows = windows(settings["length"])[-settings["held_out"] :]
    stock = language_model().eval()
    wanted = [stock(input_ids=part).logits.log_softmax(-1) for part in rows.split(16)]
    found = [{"start": "stories260k", "recipe": "stock", "divergence": 0.0, "loss": held_out_loss(stock, rows)}]
    for name, fields in START.items():
        model = applied_to(language_model().eval(), fields).model
        total = 0.0
        for part, target in zip(rows.split(16), wanted):
            logits = model(input_ids=part).logits.log_softmax(-1)
            total += float(F.kl_div(logits, target, log_target=True, reduction="sum"))
        loss = held_out_loss(model, rows)
        found.append({"start": "stories260k", "recipe": name, "divergence": total / rows.numel(), "loss": loss})
    return found


@torch.no_grad()
def start_of_sentences(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Mean of 1 - cosine between MiniLM's sentence vectors and the stock model's."""
    from transformers import AutoModel, AutoTokenizer

    from tightfit.train.tasks import model_path

    folder = model_path("demo:minilm")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = (record.SHARED / "data" / "sst2" / "dev.tsv").read_text().splitlines()[1 : settings["sentences"] + 1]
    texts = [line.split("\t")[0] for line in lines]
    batch = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=64)

    def vectors(model: Any) -> torch.Tensor:
        states = model.eval()(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        return (states * mask).sum(1) / mask.sum(1)

    wanted, found = vectors(AutoModel.from_pretrained(folder)), []
    for name, fields in START.items():
        other = vectors(applied_to(AutoModel.from_pretrained(folder), fields).model)
        far = float(1 - torch.cosine_similarity(wanted, other).mean())
        found.append({"start": "MiniLM", "recipe": name, "divergence": far})
    return found


def trained(methods: list[dict[str, Any]], seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Held-out loss after training, and that of the plain model with what was trained in it (None: there is none)."""
    import tightfit
    from tightfit.methods.reversible import Coupling

    torch.manual_seed(seed)
    model = language_model().train()
    model.config.use_cache = False
    data = windows(settings["length"])
    held_out, rows = data[-settings["held_out"] :], data[: -settings["held_out"]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        applied = tightfit.apply(model, tightfit.Recipe.from_list(methods))
    parts = [part for part in applied.parts if isinstance(part, Coupling)]
    rate = settings["learning_rate"] * (5 if any(map(_adapts, methods)) else 1)
    optimizer = applied.optimizer(torch.optim.AdamW, lr=rate, weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    for step in range(settings["steps"]):
        for part in parts:
            part.set_progress(step / settings["steps"])
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 20) * max(0.05, 1 - step / settings["steps"])
        batch = rows[torch.randint(len(rows), (settings["rows"],), generator=generator)]
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(applied.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for part in parts:
        part.set_progress(1.0)
    loss = held_out_loss(model, held_out)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plain: float | None = held_out_loss(applied.merge(), held_out)
    except tightfit.StateError:
        plain = None
    return {"loss": loss, "plain_loss": plain}


def _adapts(method: dict[str, Any]) -> bool:
    return "Lora" in method or method.get("Reversible", {}).get("adapter_dim") is not None


def run(settings: dict[str, Any] = SETTINGS, seeds: tuple[int, ...] = SEEDS, name: str = NAME) -> list[dict[str, Any]]:
    """Rows with `start`, then rows with `loss` by recipe and seed; resumes."""
    torch.set_num_threads(1)
    config = {"settings": settings, "start": START, "recipes": RECIPES}
    rows = record.rows(name, config)
    if not any("start" in row for row in rows):
        rows += start_of_language(settings) + start_of_sentences(settings)
        record.write(name, config, rows)
    done = {(row["recipe"], row["seed"]) for row in rows if "seed" in row}
    for seed, recipe in itertools.product(seeds, RECIPES):
        if (recipe, seed) in done:
            continue
        rows.append({"recipe": recipe, "seed": seed, **trained(RECIPES[recipe], seed, settings)})
        record.write(name, config, rows)
        print(rows[-1], flush=True)
    return rows
