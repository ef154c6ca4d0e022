"""Measuring a training step: allocator peak, saved bytes, time. One truth for every number.

peak_bytes is what the allocator handed out: on a GPU `torch.cuda.max_memory_allocated` over a reset step, on
the CPU the running maximum of the allocator's own events (torch.profiler, `profile_memory=True`) on top of what
was alive before. Never the process's resident size, never a formula.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tightfit.core import hfmodel
from tightfit.ops.autograd import without_graph

Step = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What one step took.

    Attributes:
        peak_bytes: highest allocator level during the step, what was alive before included.
        alive_bytes: allocator level when the step began (weights, optimizer state, gradients, batch).
        saved_bytes: unique storages kept for backward, parameters and buffers left out.
        seconds: median wall time of the timed steps.
        by_category: weights, optimizer, activations (saved_bytes), gradients (all that an optimizer's step finds, or
            the peak less those, whichever is less), temporary (the rest of the peak), host (memory of host-side stores
            when the device is not the CPU).
    """

    peak_bytes: int
    alive_bytes: int
    saved_bytes: int
    seconds: float
    by_category: dict[str, int]

    @property
    def step_bytes(self) -> int:
        """How far the step rose above what was alive before it."""
        return self.peak_bytes - self.alive_bytes


def measure(step: Step, *, warmup: int = 1, repeats: int = 3) -> Measurement:
    """Run `step` a few times and measure it.

    Args:
        step: a callable that runs one whole training step (forward, backward, optimizer, zero_grad) and keeps no
            reference to its results.
        warmup: steps run first, so that optimizer state exists and lazy initialisation is over.
        repeats: timed steps, run after the measured ones.

    Returns:
        A `Measurement`. The step runs warmup + 2 + repeats times and really trains.

    Raises:
        TypeError: `step` is not callable.

    Example:
        >>> import tightfit, torch
        >>> layer = torch.nn.Linear(64, 64)
        >>> x = torch.randn(8, 64)
        >>> m = tightfit.measure(lambda: layer(x).sum().backward())
        >>> m.saved_bytes == x.nbytes  # the linear keeps its input for the weight gradient
        True
    """
    if not callable(step):
        raise TypeError(f"measure(step): got {type(step).__name__}, accepted is a callable without arguments")
    for _ in range(warmup):
        step()
    peak, alive = _peak(step)
    with _gradients() as found:
        saved = saved_bytes(step)
    seconds = []
    for _ in range(repeats):
        _synchronise()
        start = time.perf_counter()
        step()
        _synchronise()
        seconds.append(time.perf_counter() - start)
    categories = _categories(peak, saved, max(found, default=0))
    return Measurement(peak, alive, saved, statistics.median(seconds) if seconds else 0.0, categories)


def allocator_peak(step: Step) -> int:
    """Highest allocator level while `step` runs once, what was alive before included, in bytes."""
    return _peak(step)[0]


def _peak(step: Step) -> tuple[int, int]:
    if _cuda_in_use():
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(), before
    gc.collect()
    before = live_bytes()
    return before + _cpu_rise(step), before


def _cpu_rise(step: Step) -> int:
    with allocation_profile() as profiler:
        step()
    return peak_of(profiler)


def peak_of(profiler: Any) -> int:
    """How far the CPU allocator's level rose above where it was, in a profile that has ended."""
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak


running_profiles: list[Any] = []
"""Profiles that a context manager cannot end, because they span events of a trainer."""


def end_left_profiles() -> None:
    """End the profiles of steps that have raised."""
    while running_profiles:
        running_profiles.pop().__exit__(None, None, None)


def allocation_profile():
    """A torch profiler that records the CPU allocator's events and writes nothing to stderr."""
    end_left_profiles()  # torch allows one at a time
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read by its C++ side when the first profile starts
    from torch.profiler import ProfilerActivity, profile

    return profile(activities=[ProfilerActivity.CPU], profile_memory=True)


def live_bytes(device: str = "cpu") -> int:
    """Bytes of the unique storages behind all tensors alive on `device`; memory-mapped files are left out."""
    return sum(t.untyped_storage().nbytes() for t in _distinct(t for t in live_tensors() if t.device.type == device))


def live_tensors():
    """Every tensor Python can reach, gradients included, fake and meta tensors left out."""
    for item in gc.get_objects():
        if issubclass(type(item), torch.Tensor) and type(item).__name__ != "FakeTensor" and not item.is_meta:
            yield item
            gradient = item.grad if item.is_leaf else None
            if gradient is not None:
                yield gradient


def _distinct(tensors) -> list[torch.Tensor]:
    from tightfit.core.host import is_mapped

    found: dict[int, torch.Tensor] = {}
    for tensor in (part for whole in tensors for part in hfmodel.with_storage(whole)):
        try:
            key = hfmodel.storage_key(tensor)
        except (RuntimeError, NotImplementedError):
            continue  # a tensor without storage (sparse)
        if not is_mapped(tensor):
            found.setdefault(key, tensor)
    return list(found.values())


def saved_bytes(step: Step) -> int:
    """Bytes of the unique storages that `step` packs for backward, parameters and buffers left out."""
    gc.collect()  # the memory of a model that is garbage could be used again by what the step keeps
    own: set[int] = set()
    for item in gc.get_objects():
        if issubclass(type(item), nn.Module):
            own |= hfmodel.storage_keys((*item._parameters.values(), *item._buffers.values()))
    packed: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        for part in hfmodel.with_storage(tensor):
            storage = part.untyped_storage()
            if storage._cdata not in own and not isinstance(tensor, nn.Parameter):
                packed[storage._cdata] = storage  # held, so that an address is not used twice
        return without_graph(tensor)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(storage.nbytes() for storage in packed.values())


def interleave(steps: Mapping[str, Step], *, rounds: int = 5, warmup: int = 1) -> dict[str, list[float]]:
    """Time several steps turn by turn, A B A B, so that a busy machine disturbs all of them alike.

    Returns:
        Wall seconds per round for each name. Compare medians, as ratios.
    """
    for step in steps.values():
        for _ in range(warmup):
            step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            _synchronise()
            start = time.perf_counter()
            steps[name]()
            _synchronise()
            times[name].append(time.perf_counter() - start)
    return times


@contextlib.contextmanager
def _gradients() -> Iterator[list[int]]:
    """Note the bytes of the models' gradients whenever an optimizer steps, and at the end: a whole step drops them."""
    weights, found = _weights(), []

    def note(*_: Any) -> None:
        found.append(hfmodel.unique_storage_bytes(_distinct(w.grad for w in weights if w.grad is not None)))

    hook = register_optimizer_step_pre_hook(note)
    try:
        yield found
        note()
    finally:
        hook.remove()


def _weights() -> list[torch.Tensor]:
    """Parameters and buffers of every module that is alive, where the step runs."""
    device = "cuda" if _cuda_in_use() else "cpu"
    modules = [m for m in gc.get_objects() if issubclass(type(m), nn.Module)]
    held = [t for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
    return [t for t in held if t.device.type == device]


def _categories(peak: int, saved: int, gradients: int) -> dict[str, int]:
    device = "cuda" if _cuda_in_use() else "cpu"
    optimizers = [o for o in gc.get_objects() if issubclass(type(o), torch.optim.Optimizer)]
    states = [t for o in optimizers for s in o.state.values() for t in s.values() if torch.is_tensor(t)]
    out = {
        "weights": hfmodel.unique_storage_bytes(_distinct(_weights())),
        "gradients": 0,
        "optimizer": hfmodel.unique_storage_bytes(_distinct(t for t in states if t.device.type == device)),
        "activations": saved,
    }
    rest = max(0, peak - sum(out.values()))
    out["gradients"] = min(gradients, rest)  # of a peak in forward there may be none, and not all are kept together
    out["temporary"] = rest - out["gradients"]
    out["host"] = live_bytes("cpu") if device == "cuda" else 0
    return out


def _cuda_in_use() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized() and torch.cuda.memory_allocated() > 0


def _synchronise() -> None:
    if _cuda_in_use():
        torch.cuda.synchronize()
