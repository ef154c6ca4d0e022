"""Predicted against measured step time relative to stock, with the coefficients of `tightfit calibrate`.

Each configuration takes turns with its family's stock step, each in a process of its own, as in a training run: in
one process they would share a heap, and one step would find in it what the other left. One thread; the clock is the
process's own CPU time, so other work on the machine does not count. The machine is calibrated before, and no
configuration is used for that.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from typing import Any

import record
import torch
from turns import measured, process

NAME = "step_time"
QUICK = False
ROUNDS = 21


@dataclasses.dataclass(frozen=True)
class Case:
    """One configuration; what it does not name is the family's stock."""

    family: str
    name: str
    batch: tuple[int, int] | None = None
    methods: tuple[str, ...] = ()
    attention: str = "sdpa"
    dropout: bool = True


FAMILIES: dict[str, dict[str, Any]] = {
    "BERT 4 x 256": {"batch": (8, 128), "width": 256, "layers": 4, "heads": 4},
    "BERT 6 x 384": {"batch": (8, 128), "width": 384, "layers": 6, "heads": 12},
    "Llama 4 x 256": {"batch": (4, 128), "width": 256, "layers": 4, "heads": 4},
    "Llama 4 x 512": {"batch": (2, 256), "width": 512, "layers": 4, "heads": 8},
}


def cases() -> list[Case]:
    """All configurations, family by family."""
    out = []
    for family, stock in FAMILIES.items():
        rows, length = stock["batch"]
        short = (rows, length // 4)
        out += [
            Case(family, "checkpointing", methods=("Checkpointing",)),
            Case(family, "LoRA", methods=("Lora",)),
            Case(family, "LoRA + checkpointing", methods=("Lora", "Checkpointing")),
            Case(family, "eager attention", attention="eager"),
            Case(family, "short sequences", batch=short),
            Case(family, "short sequences, checkpointing", batch=short, methods=("Checkpointing",)),
            Case(family, "half the rows", batch=(rows // 2, length)),
        ]
        if family.startswith("BERT"):
            out += [
                Case(family, "no dropout", dropout=False),
                Case(family, "no dropout, LoRA", dropout=False, methods=("Lora",)),
            ]
    return out


def build(case: Case) -> torch.nn.Module:
    """The case's model with random weights."""
    from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

    size = FAMILIES[case.family]
    shared = {
        "hidden_size": size["width"],
        "num_hidden_layers": size["layers"],
        "num_attention_heads": size["heads"],
        "attn_implementation": case.attention,
    }
    torch.manual_seed(0)
    if case.family.startswith("BERT"):
        if not case.dropout:
            shared |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return BertForSequenceClassification(BertConfig(**shared, intermediate_size=4 * size["width"]))
    wide = 8 * size["width"] // 3 // 8 * 8
    return LlamaForCausalLM(LlamaConfig(**shared, intermediate_size=wide, vocab_size=32_000))


def recipe_of(case: Case):
    import tightfit

    return tightfit.chain(*(getattr(tightfit, name)() for name in case.methods))


def batch_of(case: Case, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Random tokens, the last row a quarter shorter."""
    from tightfit.core.simulate import example_batch

    return example_batch(model, *(case.batch or FAMILIES[case.family]["batch"]))


def stepper(case: Case):
    """A whole training step of the case as a callable, and what keeps it alive."""
    import tightfit

    model = build(case)
    batch = batch_of(case, model)
    applied = tightfit.apply(model, recipe_of(case))
    applied.model.train()
    optimizer = applied.optimizer(torch.optim.AdamW, lr=1e-5)

    def step() -> None:
        applied.model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def simulation(case: Case):
    import tightfit

    model = build(case)
    return tightfit.plan(model, recipe_of(case), batch=batch_of(case, model)).simulation


def run() -> list[dict[str, Any]]:
    """One row per configuration; families that the result file holds are kept."""
    from tightfit.core.calibrate import calibrate
    from tightfit.core.timing import relative_step_time, step_time

    torch.set_num_threads(1)
    start = time.perf_counter()
    coefficients = calibrate()
    config: dict[str, Any] = {"rounds": ROUNDS, "families": FAMILIES, "machine": coefficients.machine}
    config["calibration_seconds"] = round(time.perf_counter() - start)
    earlier = record.read(NAME)
    rows: list[dict[str, Any]] = earlier["rows"] if earlier else []
    for family in FAMILIES:
        if any(row["family"] == family for row in rows):
            continue
        base = simulation(Case(family, "stock"))
        with process(functools.partial(stepper, Case(family, "stock"))) as stock:
            for case in (c for c in cases() if c.family == family):
                simulated = simulation(case)
                start = time.process_time()
                predicted = relative_step_time(simulated, base, coefficients)
                spent = time.process_time() - start
                with process(functools.partial(stepper, case)) as other:
                    truth = measured(stock, other, ROUNDS)
                rows.append(
                    {
                        "family": family,
                        "configuration": case.name,
                        "batch": case.batch or FAMILIES[family]["batch"],
                        **truth,
                        "predicted": predicted,
                        "predicted_seconds": step_time(simulated, coefficients).seconds,
                        "error_percent": 100 * (predicted / truth["measured"] - 1),
                        "error_to_least_percent": 100 * (predicted / truth["measured_least"] - 1),
                        "prediction_seconds": spent,
                    }
                )
                print(rows[-1], flush=True)
                record.write(NAME, {**config, **summary(rows)}, rows)
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Median and worst absolute error in percent."""
    errors = [abs(row["error_percent"]) for row in rows]
    return {"median_error_percent": statistics.median(errors), "worst_error_percent": max(errors)}
