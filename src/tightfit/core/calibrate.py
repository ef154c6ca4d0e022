"""What this machine takes for each kind of operator: a benchmark of some 20 seconds, kept in the user's cache.

Kinds of operators run alone at a few sizes, matrix products at a grid of dimensions. What an operator costs before it
computes anything comes from steps of tiny models whose arithmetic is next to nothing. With one thread the clock is
the process's own CPU time, so that other work on the machine does not count; else it is the wall.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tightfit.core.timing import FRESH_BYTES, Coefficients, step_time

aten = torch.ops.aten
FORMAT = 3
SIZES = (1 << 7, 1 << 12, 1 << 15, 1 << 18, 1 << 21)
ROW = 128
RING_BYTES, FAR_BYTES = 8 << 20, 96 << 20
"""Inputs rotate through this much memory: more than the inner caches hold, as in a step; large ones through more than
any cache holds, as weights and optimizer state do."""

SINGLE = (8, 32, 128, 512, 2048)
BATCHED = (16, 64, 256, 1024)
LARGEST_PRODUCT = 1 << 28
LENGTHS = (32, 128, 512)
DTYPES = (torch.float32, torch.bfloat16)


def calibrate(*, force: bool = True, progress: Callable[[str], None] | None = None) -> Coefficients:
    """Measure this machine and remember the result; about 20 seconds, and no training.

    Args:
        force: measure again even if a result for this device, torch version and thread count is in the cache.
        progress: called with a line of text before each part.

    Returns:
        The coefficients, also written to `cache_path()`. Without a writable cache they are returned all the same.

    Example:
        >>> import tightfit
        >>> tightfit.calibrate(force=False).measured  # doctest: +SKIP
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
    coefficients.cache_clear()
    return found


@functools.lru_cache(maxsize=8)
def coefficients(*, measure: bool = False) -> Coefficients:
    """This machine's coefficients from the cache; else, measured now or the built-in ones of another machine.

    Args:
        measure: calibrate now if the cache has nothing for this machine.
    """
    known = _read(cache_path())
    if known is not None:
        return known
    return calibrate() if measure else built_in()


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
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        say(f"operators, {name}")
        kinds[name] = {kind: _curve(run, dtype) for kind, run in _kinds()}
        say(f"matrix products, {name}")
        products[name] = {"single": _grid(SINGLE, 1, dtype), "batched": _grid(BATCHED, 8, dtype)}
        say(f"attention, {name}")
        attention[name] = _attention(dtype)
    say("memory")
    fresh = _fresh()
    found = Coefficients(machine(), kinds, products, attention, {"forward": 0.0}, fresh)
    say("dispatch")
    with torch.enable_grad():
        dispatch = _dispatch(found)
    return Coefficients(machine(), kinds, products, attention, dispatch, fresh)


def clock() -> float:
    """Seconds that count as work: CPU time with one thread, wall time with several."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def seconds(run: Callable[[int], Any], *, at_least: float = 3e-4, samples: int = 5, limit: float = 0.15) -> float:
    """Lowest time of one call; `run` gets a counter, to rotate its inputs."""
    run(0)
    start = clock()
    run(1)
    once = max(clock() - start, 1e-7)
    inner = max(1, min(2000, round(at_least / once)))
    best, end = float("inf"), time.perf_counter() + limit
    for _ in range(samples):
        start = clock()
        for turn in range(inner):
            run(turn)
        best = min(best, (clock() - start) / inner)
        if time.perf_counter() > end:
            break
    return best


def _kinds() -> Iterator[tuple[str, Callable]]:
    """Each kind with an operator that stands for it; a, b are (rows, 128), `out` is written to."""
    yield "add", lambda a, b: a + b
    yield "scale", lambda a, b: a * 0.5
    yield "add_", lambda a, b: a.add_(b, alpha=1e-3)
    yield "div", lambda a, b: a / b
    yield "sqrt", lambda a, b: torch.sqrt(a)
    yield "lerp_", lambda a, b: a.lerp_(b, 0.1)
    yield "addcmul_", lambda a, b: a.addcmul_(b, b, value=1e-3)
    yield "addcdiv_", lambda a, b: a.addcdiv_(b, b, value=1e-3)
    yield "fill", lambda a, b: torch.zeros_like(a)
    yield "copy", lambda a, b: a.clone()
    yield "exp", lambda a, b: torch.exp(a)
    yield "tanh", lambda a, b: torch.tanh(a)
    yield "gelu", lambda a, b: F.gelu(a)
    yield "gelu_backward", lambda a, b: aten.gelu_backward(a, b)
    yield "silu", lambda a, b: F.silu(a)
    yield "silu_backward", lambda a, b: aten.silu_backward(a, b)
    yield "softmax", lambda a, b: torch.softmax(a, -1)
    yield "softmax_backward", lambda a, b: aten._softmax_backward_data(a, b, -1, a.dtype)
    yield "layer_norm", _layer_norm
    yield "layer_norm_backward", _layer_norm_backward
    yield "sum", lambda a, b: a.sum(0)
    yield "bernoulli_", lambda a, b: a.bernoulli_(0.9)
    yield "normal_", lambda a, b: a.normal_()
    yield "sort", lambda a, b: a.sort(-1)


def _layer_norm(a, b):
    return F.layer_norm(a, (ROW,), b[0], b[0])


def _layer_norm_backward(a, b):
    statistic = b[:, :1].contiguous()
    return aten.native_layer_norm_backward(a, b, [ROW], statistic, statistic, b[0], b[0], [True, True, True])


def _curve(run: Callable, dtype: torch.dtype) -> list[tuple[int, float]]:
    points = []
    for size in SIZES:
        reach = FAR_BYTES if size == SIZES[-1] else RING_BYTES
        ring = max(1, min(64, reach // (size * dtype.itemsize * 2)))
        sample = torch.rand(size // ROW, ROW).to(dtype) + 0.25
        left = [sample.clone() for _ in range(ring)]
        right = [sample.clone() for _ in range(ring)]
        taken = seconds(lambda turn, run=run, a=left, b=right, n=ring: run(a[turn % n], b[turn % n]))
        points.append((size, taken))
    dispatch = points[0][1]
    return [(size, max(taken - dispatch, 1e-9)) for size, taken in points[1:]]


def _grid(sizes: tuple[int, ...], batch: int, dtype: torch.dtype) -> dict[tuple[int, int, int], float]:
    """Seconds of one product for every (m, n, k) of the grid; the largest are scaled up from smaller ones."""
    out: dict[tuple[int, int, int], float] = {}
    for dims in sorted(((m, n, k) for m in sizes for n in sizes for k in sizes), key=lambda d: d[0] * d[1] * d[2]):
        m, n, k = dims
        if batch * m * n * k > LARGEST_PRODUCT:
            largest = dims.index(max(dims))
            smaller = sizes[sizes.index(dims[largest]) - 1]
            out[dims] = out[tuple(smaller if i == largest else d for i, d in enumerate(dims))] * dims[largest] / smaller
            continue
        lead = (batch,) if batch > 1 else ()
        left = torch.rand(*lead, m, k).to(dtype)
        right = torch.rand(*lead, n, k).to(dtype).transpose(-1, -2)
        taken = seconds(lambda turn, a=left, b=right: a @ b, samples=4)
        out[dims] = taken / batch
    base = min(out.values())
    return {dims: max(taken - 0.8 * base, 0.1 * base) for dims, taken in out.items()}


def _attention(dtype: torch.dtype) -> dict[str, list[tuple[int, float]]]:
    forward, backward = [], []
    run = aten._scaled_dot_product_flash_attention_for_cpu
    back = aten._scaled_dot_product_flash_attention_for_cpu_backward
    for length in LENGTHS:
        query = torch.rand(2, 4, length, 64).to(dtype)
        mask = torch.zeros(2, 1, length, length, dtype=dtype)
        work = 8 * length * length * 64
        out, statistic = run(query, query, query, attn_mask=mask)
        taken = seconds(lambda turn, q=query, m=mask: run(q, q, q, attn_mask=m))
        forward.append((length, taken / work))
        arguments = (query, query, query, query, out, statistic, 0.0, False)
        taken = seconds(lambda turn, a=arguments, m=mask: back(*a, attn_mask=m))
        backward.append((length, taken / work))
    return {"forward": forward, "backward": backward}


def _fresh() -> float:
    """Seconds per byte that the first write to memory new from the system costs above one to memory known already."""
    count = 2 * FRESH_BYTES // 4
    known = torch.zeros(count)
    warm = min(_timed(lambda: known.zero_()) for _ in range(3))
    cold = min(_timed(lambda: torch.full((count,), 1.0)) for _ in range(3))
    return max(0.0, cold - warm) / (4 * count)


def _timed(run: Callable[[], Any]) -> float:
    start = clock()
    run()
    return clock() - start


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
            priced = step_time(simulation, Coefficients(**{**vars(found), "dispatch": dict.fromkeys(spent, 0.0)}))
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


_TINY = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 64}


def _tiny_encoder() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**_TINY, max_position_embeddings=16)).train()


def _tiny_decoder() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_TINY, max_position_embeddings=16, use_cache=False)).train()
