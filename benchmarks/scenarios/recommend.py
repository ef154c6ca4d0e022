"""Recommended recipes run for real: does each stay under its budget, and is the best one the fastest that fits?

Three models with random weights, five budgets each, from just enough for the most frugal recipe to enough for the stock
step. Every recipe that fits at one of the budgets is run, the steps of a model's recipes turn by turn, in process CPU
time with one thread. A step is a whole optimizer step: all its micro-batches and the update.
"""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable
from typing import Any

import record
import torch

NAME = "recommend"
QUICK = False
ROWS, LENGTH, KEPT = 8, 64, 2000
SHARES = (0.0, 0.15, 0.35, 0.65, 1.0)
ROUNDS, BUILDS = 6, 2
METHODS = ["Checkpointing", "FusedOps", "Lora", "Mesa", "WtaCrs"]
"""Beside a vocabulary; every recipe of up to three is run for real, so each more doubles the time."""
CONFIG = {
    "batch": [ROWS, LENGTH],
    "kept_ids": KEPT,
    "shares": list(SHARES),
    "rounds": ROUNDS,
    "builds": BUILDS,
    "methods": METHODS,
}


def models() -> dict[str, Callable[[], Any]]:
    """Name -> builder."""
    import transformers as hf

    shape = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    small = {"hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 4, "intermediate_size": 704}
    gpt2 = {"n_embd": 256, "n_layer": 8, "n_head": 4, "vocab_size": 16000, "bos_token_id": 0, "eos_token_id": 0}
    llama = {**small, "num_key_value_heads": 2, "vocab_size": 16000, "max_position_embeddings": 512}
    return {
        "BERT, MiniLM size": lambda: hf.BertForSequenceClassification(hf.BertConfig(**shape)),
        "GPT-2, 8 blocks of 256": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**gpt2)),
        "Llama, 8 blocks of 256": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**llama)),
    }


def run() -> list[dict[str, Any]]:
    """One row per model and budget."""
    torch.set_num_threads(1)
    earlier = record.read(NAME)
    rows = earlier["rows"] if earlier and earlier["config"] == CONFIG else []
    done = {row["model"] for row in rows}
    for name, build in models().items():
        if name in done:
            continue
        torch.manual_seed(0)
        for row in of_model(build()):
            rows.append({"model": name, **row})
            print(rows[-1], flush=True)
        record.write(NAME, CONFIG, rows)
    return rows


def of_model(model: Any) -> list[dict[str, Any]]:
    """The rows of one model."""
    import tightfit
    from tightfit.core.calibrate import coefficients
    from tightfit.core.fitting import need
    from tightfit.core.recommend import candidates
    from tightfit.core.search import Search
    from tightfit.core.simulate import example_batch

    batch = example_batch(model, ROWS, LENGTH)
    methods = [getattr(tightfit, name) for name in METHODS]
    vocabulary = tightfit.PartialEmbedding(ids=range(KEPT))
    frugal = tightfit.chain(tightfit.Lora(rank=4), tightfit.Checkpointing())
    least = need(tightfit.plan(model, frugal, batch=example_batch(model, 1, LENGTH), accumulate=2))
    most = need(tightfit.plan(model, batch=batch))
    budgets = [round(1.02 * least + share * (1.02 * most - 1.02 * least)) for share in SHARES]
    search = Search(model, batch, 0, None, {"optimizer": "adamw"})
    groups = candidates(model, methods, [vocabulary], "any", False)
    fits, choices, seconds, steps = {}, {}, {}, {}
    for budget in budgets:
        told: list[int] = []
        start = time.process_time()
        choices[budget] = tightfit.recommend(
            model,
            batch=batch,
            budget=budget,
            methods=methods,
            extra=[vocabulary],
            progress=lambda done, _, told=told: told.append(done),
        )
        seconds[budget], steps[budget] = time.process_time() - start, told[-1]
        search.fitting.budget = budget
        found = search.run(groups, 3, prune=False)
        fits[budget] = {(str(fit.recipe), fit.size): fit for fit in found}
        for choice in choices[budget]:  # the two searches may stop at different micro-batches of a recipe
            fits[budget].setdefault(
                (str(choice.recipe), choice.batch_size), search.fitting.made(choice.recipe, choice.batch_size)
            )
    every = {key: fit for found in fits.values() for key, fit in found.items()}
    taken = measured_seconds(model, batch, every)
    shown = {(str(c.recipe), c.batch_size): c for found in choices.values() for c in found}
    peaks = {key: choice.plan.verify().peak_bytes for key, choice in shown.items()}
    out = []
    for share, budget in zip(SHARES, budgets):
        keys = [(str(c.recipe), c.batch_size) for c in choices[budget]]
        best = keys[0]
        alike = [key for key, fit in fits[budget].items() if fit.recipe.exact or not fits[budget][best].recipe.exact]
        out.append(
            {
                "share": share,
                "budget_bytes": budget,
                "recommended": [describe(fits[budget][key], taken[key], peaks[key]) for key in keys],
                "others": [describe(f, taken[k]) for k, f in fits[budget].items() if k not in keys],
                "under_budget": all(peaks[key] <= budget for key in keys),
                "best_over_fastest": taken[best] / min(taken[key] for key in alike),
                "best_over_fastest_not_exact_either": taken[best] / min(taken[key] for key in fits[budget]),
                "recommend_seconds": seconds[budget],
                "simulated_steps": steps[budget],
                "calibrated": coefficients().measured,
            }
        )
    return out


def describe(fit: Any, seconds: float, peak: int | None = None) -> dict[str, Any]:
    """One recipe of a row."""
    out = {
        "recipe": str(fit.recipe),
        "exact": fit.recipe.exact,
        "rows": fit.size,
        "parts": fit.turns,
        "predicted_peak_bytes": fit.plan.peak_bytes,
        "predicted_step_time": fit.time,
        "step_seconds": seconds,
    }
    return out if peak is None else {**out, "measured_peak_bytes": peak}


def measured_seconds(model: Any, batch: dict[str, torch.Tensor], fits: dict[Any, Any]) -> dict[Any, float]:
    """Lowest CPU seconds of a whole optimizer step of each recipe, all of them alive and run turn by turn.

    All are built twice: where a model's weights lie in memory can make some per cent of its time.
    """
    best = dict.fromkeys(fits, float("inf"))
    for _ in range(BUILDS):
        steps = {key: step_of(model, batch, fit) for key, fit in fits.items()}
        gc.collect()
        gc.disable()
        for turn in range(ROUNDS + 1):
            for key, step in steps.items():
                start = time.process_time()
                step()
                if turn:  # the first round makes the optimizer's state
                    best[key] = min(best[key], time.process_time() - start)
        gc.enable()
    return best


def step_of(model: Any, batch: dict[str, torch.Tensor], fit: Any) -> Callable[[], None]:
    """A whole optimizer step under a recipe, on a copy of the model."""
    import tightfit
    from tightfit.core.batch import cut

    applied = tightfit.apply(copy.deepcopy(model).train(), fit.recipe)
    optimizer = applied.optimizer(torch.optim.AdamW, lr=1e-4, foreach=False)
    part = cut(batch, fit.size)

    def step() -> None:
        for _ in range(fit.turns):
            (applied.model(**part).loss / fit.turns).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
