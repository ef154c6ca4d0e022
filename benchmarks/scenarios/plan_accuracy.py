"""Predicted against measured peak of one training step, over many configurations.

Each configuration runs in a fresh process: build the model, simulate the step, then run it warm under the profiler
and take the running maximum of the allocator's events, for the step and for each phase. Rows are written as they come,
so an interrupted run continues where it stopped. `python benchmarks/scenarios/plan_accuracy.py PATTERN` makes the
matching rows again.
"""

from __future__ import annotations

import fnmatch
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent.parent)]

import record  # noqa: E402
from plan_configurations import DEFAULTS, build, configurations  # noqa: E402

NAME = "plan_accuracy"
QUICK = False
PHASES = ("forward", "backward", "clip", "optimizer", "zero_grad")


def run(again: str = "") -> list[dict[str, Any]]:
    """One row per configuration; those that match the pattern `again` are made anew."""
    earlier = record.read(NAME)
    rows = {row["name"]: row for row in earlier["rows"]} if earlier else {}
    wanted = configurations()
    for name, settings in wanted.items():
        known = rows.get(name)
        if known and known["config"] == settings and "error" in known and not fnmatch.fnmatch(name, again):
            continue
        command = [sys.executable, __file__, "--one", json.dumps(settings)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = [line[7:] for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if found:
            row = {"name": name, "config": settings, **json.loads(found[0])}
            print(f"{row['error'] * 100:+9.4f} % {row['step_error'] * 100:+9.4f} %  {name}", flush=True)
        else:
            last = " ".join(done.stderr.strip().splitlines()[-1:])
            row = {"name": name, "config": settings, "failure": f"exit code {done.returncode} {last}"}
            print(f"FAILED  {name}: {row['failure']}", flush=True)
        rows[name] = row
        record.write(NAME, {"defaults": DEFAULTS}, [rows[n] for n in wanted if n in rows])
    print("\n".join(summary(list(rows.values()))))
    return list(rows.values())


def run_one(c: dict) -> dict:
    """Predict, then measure."""
    import gc

    import torch

    from tightfit.core import memory
    from tightfit.core.simulate import example_batch, simulate
    from tightfit.core.simulate.optimizers import make_optimizer

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = build(c)
    batch = example_batch(model, c["batch"], c["length"], padded=c["mask"] == "padded")
    if c["mask"] == "absent":
        batch.pop("attention_mask", None)
    autocast = torch.bfloat16 if c["autocast"] else None
    start = time.perf_counter()
    found = simulate(
        model, batch, optimizer=c["optimizer"], clip=c["clip"], autocast=autocast, accumulate=c["accumulate"]
    )
    seconds = time.perf_counter() - start
    optimizer = make_optimizer(c["optimizer"], model.parameters(), "cpu")

    def step(phase=torch.profiler.record_function) -> None:
        for _ in range(c["accumulate"]):
            with phase("phase:forward"), torch.autocast("cpu", dtype=torch.bfloat16, enabled=c["autocast"]):
                loss = model(**batch).loss
            with phase("phase:backward"):
                loss.backward()
        if c["clip"] is not None:
            with phase("phase:clip"):
                torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], c["clip"])
        with phase("phase:optimizer"):
            optimizer.step()
        with phase("phase:zero_grad"):
            optimizer.zero_grad()

    step()
    gc.collect()
    gc.disable()
    before = memory.live_bytes()
    measured, phases = profile(step, before)
    predicted = {name: level for name, level in found.phases.items() if name != "recompute"}
    if "recompute" in found.phases:
        predicted["backward"] = max(predicted["backward"], found.phases["recompute"])
    return {
        "predicted": found.peak_bytes,
        "measured": measured,
        "error": found.peak_bytes / measured - 1,
        "static": before,
        "static_predicted": found.static_bytes,
        "step_error": (found.peak_bytes - measured) / max(1, measured - before),
        "peak_phase": "backward" if found.peak_phase == "recompute" else found.peak_phase,
        "peak_module": found.peak_module,
        "peak_operator": found.peak_operator,
        "predicted_phases": predicted,
        "measured_phases": phases,
        "slack": found.slack_bytes,
        "notes": list(found.notes),
        "seconds": round(seconds, 2),
    }


def profile(step, before: int) -> tuple[int, dict[str, int]]:
    """Peak of the step and of its phases from the allocator's events."""
    from tightfit.core.memory import allocation_profile

    with allocation_profile() as run:
        step()
    events = run.profiler.kineto_results.events()
    spans = sorted(
        (e.start_ns(), e.start_ns() + e.duration_ns(), e.name()[6:]) for e in events if e.name().startswith("phase:")
    )
    level, peak, phases = before, before, {}
    at = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        while at < len(spans) and event.start_ns() >= spans[at][0]:
            phases[spans[at][2]] = max(level, phases.get(spans[at][2], 0))
            at += 1
        level += event.nbytes()
        peak = max(peak, level)
        if at:
            name = spans[at - 1][2]
            phases[name] = max(level, phases.get(name, 0))
    return peak, phases


def percentile(values: list[float], share: float) -> float:
    """The value that `share` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]


def errors(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Signed relative errors: of the peak, of the part above the static bytes, of the maxima of phases."""
    return {
        "peak": [r["error"] for r in rows],
        "part above the static bytes": [r["step_error"] for r in rows],
        "maxima of phases": [
            r["predicted_phases"][p] / level - 1
            for r in rows
            for p, level in r["measured_phases"].items()
            if p in PHASES
        ],
    }


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """Median, 95th percentile and worst errors, in per cent, and how often the phase of the peak is right."""
    whole = [r for r in rows if "error" in r]
    lines = []
    for title, found in errors(whole).items():
        size = [abs(e) * 100 for e in found]
        lines.append(
            f"{title:30s} n={len(size):4d}  median {statistics.median(size):.4f} %  "
            f"p95 {percentile(size, 0.95):.4f} %  worst {max(size):.4f} %  most under {min(0, *found) * 100:+.4f} %"
        )
    right, decided = phase_hits(whole)
    lines.append(f"phase of the peak right: {right} of {decided} (where two phases differ by more than 0.1 %)")
    return lines + [f"FAILED {r['name']}: {r['failure']}" for r in rows if "failure" in r]


def phase_hits(rows: list[dict[str, Any]]) -> tuple[int, int]:
    """In how many rows the phase of the peak is right, and in how many one phase is clearly the highest."""
    decided = [r for r in rows if clear_peak(r["measured_phases"])]
    right = sum(r["peak_phase"] == max(r["measured_phases"], key=r["measured_phases"].get) for r in decided)
    return right, len(decided)


def clear_peak(phases: dict[str, int]) -> bool:
    """Whether the highest phase is more than 0.1 % above the next."""
    first, second = sorted(phases.values())[-1:-3:-1]
    return first > second * 1.001


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print("RESULT " + json.dumps(run_one({**DEFAULTS, **json.loads(sys.argv[2])})))
    else:
        run(*sys.argv[1:2])
