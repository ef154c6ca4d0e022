"""Velora's linear layer against that of PEFT's VeLoRA variant and torch's, and whole LoRA steps with either.

Operators: forward and backward of one layer on 2,048 rows in float32, 32 groups, one thread; process CPU time, taken in
turns, so that other work on the machine disturbs all alike. Temporary bytes are the allocator's rise above the
output, what is kept, and the weight gradient, with an input that takes no gradient.

Steps: bytes are planned on models without weights, so they are the same on every machine. Times are forward and
backward of fewer blocks, against LoRA alone, as `turns` takes them.
"""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import record
from turns import measured, process

NAME = "velora_operator"
QUICK = False
GROUPS = 32
TOKENS = 2048
ROUNDS = 41
STEP_ROUNDS = 5
LAYERS = [("lora_A", width, rank) for width in (768, 3072) for rank in (8, 16, 64)] + [("dense", 3072, 768)]
KINDS = ("torch", "PEFT", "Velora")


def operators(width: int, out: int) -> tuple[dict[str, Callable], Any]:
    """The three layers as functions of the input, with one weight and one direction."""
    import torch
    from peft.tuners.lora.velora import VeloraFunction

    from tightfit.ops.linear import linear
    from tightfit.ops.subtoken import Subtoken

    weight = torch.nn.Parameter(torch.randn(out, width) / width**0.5)
    codec = Subtoken(width, GROUPS, "random")
    made = {
        "torch": lambda x: torch.nn.functional.linear(x, weight),
        "PEFT": lambda x: VeloraFunction.apply(x, weight, None, codec.direction, GROUPS, 1.0),
        "Velora": lambda x: linear(x, weight, codec=codec),
    }
    return made, weight


def operator_row(name: str, width: int, out: int) -> dict[str, Any]:
    """Times, temporary bytes and kept bytes of one layer."""
    import torch

    from tightfit.core.memory import allocator_peak, live_bytes, saved_bytes

    torch.manual_seed(0)
    made, weight = operators(width, out)
    held = torch.nn.ParameterList([weight])  # a module's weights are not counted as kept
    x, pull = torch.randn(TOKENS, width), torch.randn(TOKENS, out)
    seconds: dict[str, list[float]] = {kind: [] for kind in made}
    temporary, kept, grads = {}, {}, {}

    def step(kind: str, given: Any) -> None:
        made[kind](given).backward(pull)

    for kind in made:
        step(kind, x.clone())  # the first run of anything is slower
        kept[kind] = saved_bytes(lambda kind=kind: step(kind, x.clone().requires_grad_()))
        weight.grad = None
        gc.collect()
        before = live_bytes()
        rise = allocator_peak(lambda kind=kind: step(kind, x)) - before
        temporary[kind] = rise - TOKENS * out * 4 - weight.nbytes - (0 if kind == "torch" else kept[kind])
        grads[kind], weight.grad = weight.grad, None
    # no copy of x is timed: operators may hang what they keep on it, so each round has its own
    for turn in range(ROUNDS):
        for kind in KINDS[turn % 3 :] + KINDS[: turn % 3]:
            given = x.clone().requires_grad_()
            start = time.process_time()
            step(kind, given)
            seconds[kind].append(time.process_time() - start)
            weight.grad = None
    ours, theirs = seconds["Velora"], seconds["PEFT"]
    ratios = sorted(a / b for a, b in zip(ours, theirs))
    return {
        "layer": f"{name} {width} -> {out}",
        "seconds": {kind: statistics.median(times) for kind, times in seconds.items()},
        "of_peft": statistics.median(ours) / statistics.median(theirs),
        "of_peft_quartiles": [ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]],
        "of_torch": statistics.median(ours) / statistics.median(seconds["torch"]),
        "kept_bytes": kept,
        "temporary_bytes": temporary,
        "parameters": sum(p.numel() for p in held),
        "difference_to_peft": float((grads["Velora"] - grads["PEFT"]).norm() / grads["PEFT"].norm()),
    }


# adapters on all linear layers of the blocks, Velora on the same
WHERE = {"bert": "encoder.layer.*.dense|query|key|value", "llama": "*_proj"}


def recipes(family: str) -> dict[str, list[dict[str, Any]]]:
    """Name -> methods with their fields."""
    layers = r".*encoder\.layer\..*(query|key|value|dense)" if family == "bert" else r".*_proj"
    sub = {"num_groups": GROUPS, "init_type": "batch_average_once"}
    peft = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": layers, "velora_config": sub}
    few, every = {"groups": GROUPS}, {"groups": GROUPS, "where": WHERE[family]}
    return {
        "stock": [],
        "Velora, value and down": [{"Velora": few}],
        "Lora": [{"Lora": {}}],
        FROZEN: [{"Lora": {}}],
        "Lora by PEFT with its VeLoRA": [{"Lora": {"config": peft}}],
        "Lora + Velora, value and down": [{"Lora": {}}, {"Velora": few}],
        "Lora + Velora, all layers": [{"Lora": {}}, {"Velora": every}],
        "Lora + FusedOps": [{"Lora": {}}, {"FusedOps": {}}],
        "Lora + Checkpointing": [{"Lora": {}}, {"Checkpointing": {}}],
    }


FROZEN = "Lora, first matrices frozen (LoRA-FA)"
TIMED = ("Lora by PEFT with its VeLoRA", "Lora + Velora, all layers")


def planned(family: str, dropout: float, size: tuple[int, int], recipe: str) -> dict[str, int]:
    """Peak above the weights and saved bytes of one step."""
    from activations import build

    import tightfit
    from tightfit.core.simulate import example_batch, simulate

    model = build(family, dropout)
    batch = example_batch(model, *size, padded=False)
    model = tightfit.apply(model, tightfit.Recipe.from_list(recipes(family)[recipe])).model
    for module in model.modules():
        if hasattr(module, "lora_velora_initialized"):  # or it would look at values
            module.lora_velora_initialized["default"] = True
    for key, parameter in model.named_parameters():
        if recipe == FROZEN and ".lora_A." in key:
            parameter.requires_grad_(False)
    found = simulate(model, batch, optimizer="sgd", extrapolate=False)
    return {"peak_bytes": found.pass_bytes - found.static_bytes, "saved_bytes": found.saved_bytes}


def step_rows() -> list[dict[str, Any]]:
    """One row per model and recipe."""
    from activations import MODELS

    rows: list[dict[str, Any]] = []
    for name, (family, dropout, size) in MODELS.items():
        for recipe in recipes(family):
            found = planned(family, dropout, size, recipe)
            rows.append({"model": name, "batch": f"{size[0]} x {size[1]}", "recipe": recipe, **found})
            print(rows[-1], flush=True)
    return rows


def time_rows() -> list[dict[str, Any]]:
    """Step times of few blocks against LoRA's."""
    from activation_time import MODELS, stepper

    rows: list[dict[str, Any]] = []
    for name, settings in MODELS.items():
        made = recipes(settings["family"])
        with process(functools.partial(stepper, name, made["Lora"])) as lora:
            for recipe in TIMED:
                with process(functools.partial(stepper, name, made[recipe])) as other:
                    found = measured(lora, other, STEP_ROUNDS)
                rows.append({"timed_model": name, "recipe": recipe, **found})
                print(rows[-1], flush=True)
    return rows


def run() -> list[dict[str, Any]]:
    """Bytes of steps, operators, times of steps."""
    import torch

    torch.set_num_threads(1)
    rows = step_rows()
    for layer in LAYERS:
        rows.append(operator_row(*layer))
        print(rows[-1], flush=True)
    rows += time_rows()
    settings = {"tokens": TOKENS, "groups": GROUPS, "rounds": ROUNDS, "step_rounds": STEP_ROUNDS, "dtype": "float32"}
    record.write(NAME, settings, rows)
    return rows
