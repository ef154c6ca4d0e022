"""What this machine takes for each kind of operator: a benchmark of some 50 seconds, kept in the user's cache.

Kinds of operators run alone at a few sizes, matrix products at a grid of dimensions (`microbench`). What an operator
costs before it computes anything comes from steps of tiny models whose arithmetic is next to nothing. With one thread
the clock is the process's own CPU time, so that other work on the machine does not count; else it is the wall.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import math
import os
import platform
import statistics
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tightfit.core.microbench import (
    BATCH,
    BATCHED,
    CHANNELS,
    FRESH_BYTES,
    LENGTHS,
    SINGLE,
    SIZES,
    Pools,
    Probe,
    attention_probes,
    clock,
    fresh_probes,
    kind_probes,
    medians,
    product_probes,
    warm_heap,
)
from tightfit.core.timing import Coefficients, step_time

FORMAT = 5
DTYPES = {torch.float32: (5, 28.0), torch.bfloat16: (2, 14.0)}
"""Element type -> most passes, and seconds after which none is begun (of the first two, none is left out)."""


def calibrate(*, force: bool = True, progress: Callable[[str], None] | None = None) -> Coefficients:
    """Measure this machine and remember the result; about 50 seconds, and no training.

    Args:
        force: measure again even if a result for this device, torch version and thread count is in the cache.
        progress: called with a line of text before each part.

    Returns:
        The coefficients, also written to `cache_path()`. Without a writable cache they are returned all the same.

    Example:
        >>> calibrate(force=False).measured  # doctest: +SKIP
        True
    """
    if not force:
        known = _read(cache_path())
        if known is not None:
            return known
    say = progress or (lambda line: None)
    collecting = gc.isenabled()
    gc.disable()
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            found = _measure(say)
    finally:
        if collecting:
            gc.enable()
    _write(cache_path(), found)
    _kept.cache_clear()
    return found


def coefficients(*, measure: bool = False) -> Coefficients:
    """This machine's coefficients from the cache; else, measured now or the built-in ones of another machine.

    Args:
        measure: calibrate now if the cache has nothing for this machine.
    """
    known = _kept(cache_path())
    if known is not None:
        return known
    return calibrate() if measure else built_in()


@functools.lru_cache(maxsize=8)
def _kept(path: Path) -> Coefficients | None:
    return _read(path)


@functools.cache
def built_in() -> Coefficients:
    """Coefficients measured on another machine: good enough to order recipes, not to promise a ratio."""
    text = resources.files("tightfit.core").joinpath("coefficients.json").read_text(encoding="utf-8")
    return Coefficients.from_json(json.loads(text)["coefficients"], measured=False)


def machine() -> dict[str, Any]:
    """What the coefficients depend on."""
    return {"device": _processor(), "torch": torch.__version__, "threads": torch.get_num_threads(), "format": FORMAT}


def cache_path() -> Path:
    """Where the coefficients of this machine are kept: $XDG_CACHE_HOME/tightfit, or ~/.cache/tightfit."""
    base = os.environ.get("XDG_CACHE_HOME")
    folder = Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache"
    parts = machine()
    name = "-".join(f"{parts[key]}" for key in ("device", "torch", "threads"))
    return folder / "tightfit" / f"coefficients-{''.join(c if c.isalnum() or c in '.-' else '_' for c in name)}.json"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _read(path: Path) -> Coefficients | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["machine"] != machine():
            return None
        return Coefficients.from_json(data["coefficients"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # absent, of another format or damaged: it is only a cache


def _write(path: Path, found: Coefficients) -> None:
    from tightfit.core.artifacts import write_text

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({"machine": machine(), "coefficients": found.to_json()}) + "\n")
    except OSError:
        return  # a read-only home is no reason to fail


# -- the benchmark ----------------------------------------------------------------------------------------------------


def _measure(say: Callable[[str], None]) -> Coefficients:
    kinds, products, attention = {}, {}, {}
    fresh = 0.0
    top = warm_heap()
    for dtype, (passes, limit) in DTYPES.items():
        name = str(dtype).removeprefix("torch.")
        say(f"operators, {name}")
        pools = Pools.of(dtype)
        found = medians(functools.partial(_probes, pools), passes=passes, limit=limit)
        kinds[name] = _curves(found)
        products[name] = {
            "single": _grid(found, "single", SINGLE, 1),
            "batched": _grid(found, "batched", BATCHED, BATCH),
        }
        attention[name] = {
            way: [(n, found[way, n] / (BATCH * n * n * CHANNELS)) for n in LENGTHS] for way in ("forward", "backward")
        }
        if dtype is torch.float32:
            fresh = max(0.0, found["fresh",] - found["known",]) / (2 * FRESH_BYTES)
    del top
    say("dispatch")
    operators = Coefficients(machine(), kinds, products, attention, {"forward": 0.0}, fresh)
    with torch.enable_grad():
        dispatch = _dispatch(operators)
    return dataclasses.replace(operators, dispatch=dispatch)


def _probes(pools: Pools, turn: int) -> Iterator[Probe]:
    yield from kind_probes(pools)
    yield from product_probes(pools, turn)
    yield from attention_probes(pools)
    yield from fresh_probes()


def _curves(found: dict[tuple, float]) -> dict[str, list[tuple[int, float]]]:
    """Seconds by kind and elements, less what a call costs that has next to nothing to compute."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for key, taken in found.items():
        if key[-1] in SIZES and len(key) == 2:
            curves.setdefault(key[0], []).append((key[1], taken))
    return {
        kind: [(size, max(taken - points[0][1], 1e-9)) for size, taken in points[1:]]
        for kind, points in ((kind, sorted(points)) for kind, points in curves.items())
    }


def _grid(found: dict[tuple, float], how: str, sizes: tuple[int, ...], batch: int) -> dict[tuple[int, int, int], float]:
    """Seconds of one product for every (m, n, k) of the grid; the largest are scaled up from smaller ones."""
    base = min(taken for key, taken in found.items() if key[0] == how) / batch
    out: dict[tuple[int, int, int], float] = {}
    for dims in sorted(((m, n, k) for m in sizes for n in sizes for k in sizes), key=math.prod):
        taken = found.get((how, *dims))
        if taken is not None:
            out[dims] = max(taken / batch - 0.8 * base, 0.1 * base)
            continue
        largest = dims.index(max(dims))
        smaller = sizes[sizes.index(dims[largest]) - 1]
        m, n, k = (smaller if i == largest else size for i, size in enumerate(dims))
        out[dims] = out[m, n, k] * dims[largest] / smaller
    return out


def _dispatch(found: Coefficients) -> dict[str, float]:
    """Seconds per operator and phase before any arithmetic, from steps of tiny models."""
    from tightfit.core.simulate import simulate
    from tightfit.core.simulate.batches import example_batch

    spent = {"forward": 0.0, "backward": 0.0, "optimizer": 0.0, "recompute": 0.0}
    counted = dict.fromkeys(spent, 0)
    for build in (_tiny_encoder, _tiny_decoder):
        plain, again = build(), build()
        _checkpoint(again)
        batch = example_batch(plain, 2, 8)
        taken, rerun = _phases(plain, batch), _phases(again, batch)
        taken["recompute"] = rerun["backward"] - taken["backward"]
        for model, names in ((plain, ("forward", "backward", "optimizer")), (again, ("recompute",))):
            simulation = simulate(model, batch)
            priced = step_time(simulation, dataclasses.replace(found, dispatch=dict.fromkeys(spent, 0.0)))
            for name in names:
                spent[name] += taken[name] - priced.phases.get(name, 0.0)
                counted[name] += sum(number for call, number in simulation.calls.items() if call[0] == name)
    out = {name: max(spent[name], 0.0) / max(1, counted[name]) for name in spent}
    return {**out, "clip": out["optimizer"], "zero_grad": 0.0}


def _phases(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False)
    rows: dict[str, list[float]] = {"forward": [], "backward": [], "optimizer": []}
    for _ in range(30):
        start = clock()
        loss = model(**batch).loss
        forward = clock()
        loss.backward()
        backward = clock()
        optimizer.step()
        optimizer.zero_grad()
        rows["forward"].append(forward - start)
        rows["backward"].append(backward - forward)
        rows["optimizer"].append(clock() - backward)
    return {name: statistics.quantiles(values, n=4)[0] for name, values in rows.items()}


def _checkpoint(model: Any) -> None:
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # the name since transformers 5.2x
        model.activation_checkpointing_enable(options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


_TINY: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 64,
}


def _tiny_encoder() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**_TINY, max_position_embeddings=16)).train()


def _tiny_decoder() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_TINY, max_position_embeddings=16, use_cache=False)).train()
