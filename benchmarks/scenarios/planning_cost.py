"""What a plan costs: an 8 B Llama from its config in a fresh process, and a simulated step beside a merely fake one.

Run it on an otherwise idle machine: its figures are seconds.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

NAME = "planning_cost"
QUICK = False
MODELS = ("bert", "llama", "gpt2", "t5")

FRESH = """
import json, resource, sys, time
methods, extrapolate = json.loads(sys.argv[1])
import tightfit
from transformers import LlamaConfig
config = LlamaConfig(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                     num_attention_heads=32, num_key_value_heads=8)
model = tightfit.skeleton(config, task="causal-lm")
recipe = tightfit.chain(*(getattr(tightfit, name)() for name in methods))
plan = tightfit.plan(model, recipe, batch=(4, 2048), extrapolate=extrapolate)
print(json.dumps({"peak_bytes": plan.peak_bytes, "rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
"""


def run(runs: int = 3) -> list[dict[str, Any]]:
    """Seconds and resident memory of whole processes, and ratios of simulated to fake steps."""
    import record

    rows: list[dict[str, Any]] = []
    for methods in ([], ["Checkpointing"]):
        for extrapolate in ("auto", False):
            seconds, found = [], {}
            for _ in range(runs):
                start = time.perf_counter()
                command = [sys.executable, "-c", FRESH, json.dumps([methods, extrapolate])]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                seconds.append(round(time.perf_counter() - start, 2))
                found = json.loads(done.stdout.splitlines()[-1])
            name = " ".join(["8 B Llama, 4 x 2048", *methods, "extended" if extrapolate else "all 32 blocks"])
            rows.append({"name": name, "process_seconds": seconds, **found})
            print(rows[-1], flush=True)
            record.write(NAME, {}, rows)
    for family in MODELS:
        rows.append({"name": f"{family}, 12 blocks of width 768, 8 x 128", **beside_fake(family, runs)})
        print(rows[-1], flush=True)
        record.write(NAME, {}, rows)
    return rows


def beside_fake(family: str, runs: int) -> dict[str, Any]:
    """CPU seconds of `simulate` and of the same step under FakeTensorMode alone, interleaved."""
    import torch
    from plan_configurations import DEFAULTS, build

    from tightfit.core.simulate import example_batch, simulate

    model = build({**DEFAULTS, "family": family, "width": 768, "blocks": 12})
    batch = example_batch(model, 8, 128)
    alone, simulated = [], []
    for turn in range(runs + 1):
        start = time.process_time()
        fake_step(model, batch)
        middle = time.process_time()
        simulate(model, batch, extrapolate=False)
        if turn:  # the first of each is a warm-up
            alone.append(middle - start)
            simulated.append(time.process_time() - middle)
    torch.set_grad_enabled(True)
    ratio = statistics.median(s / a for s, a in zip(simulated, alone))
    return {"fake_seconds": statistics.median(alone), "simulated_seconds": statistics.median(simulated), "ratio": ratio}


def fake_step(model, batch) -> None:
    """One step on fake tensors, optimizer state made before: copy, forward, backward, optimizer."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from tightfit.core.simulate.optimizers import make_optimizer
    from tightfit.core.simulate.shadow import fake_copy

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    twin = fake_copy(model, mode).model
    inputs = {key: mode.from_tensor(value) for key, value in batch.items()}
    with mode:
        optimizer = make_optimizer("adamw", twin.parameters(), "cpu")
        twin(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent.parent)]
    run()
