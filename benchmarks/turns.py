"""Steps that take turns, each in a process of its own with one thread, timed by that process's CPU time.

In one process they would share a heap, and one step would find in it what the other left. Other work on the machine
does not count.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch


def forward_backward(applied: Any, batch: dict[str, Any]) -> Callable[[], None]:
    """A step of an applied recipe without its optimizer."""

    def step() -> None:
        applied.model(**batch).loss.backward()
        for parameter in applied.parameters():
            parameter.grad = None

    return step


def serve(make: Callable[[], Callable[[], None]], requests) -> None:
    """Run a step for every request, and answer with its seconds and the bytes faulted in."""
    torch.set_num_threads(1)
    step = make()
    gc.collect()
    while requests.recv():
        faults, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.process_time()
        step()
        seconds = time.process_time() - start
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
        requests.send((seconds, faults * resource.getpagesize()))


@contextlib.contextmanager
def process(make: Callable[[], Callable[[], None]]) -> Iterator[Callable[[], tuple[float, int]]]:
    """A process that makes a step and holds it, as a function that runs it there once."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=serve, args=(make, theirs), daemon=True)
    child.start()

    def step() -> tuple[float, int]:
        ours.send(True)
        return ours.recv()

    try:
        yield step
    finally:
        ours.send(False)
        child.join()


Rounds = list[tuple[tuple[float, int], tuple[float, int]]]


def measured(stock: Callable, other: Callable, rounds: int) -> dict[str, float]:
    """What rounds stock, case, stock, case ... took, after two to warm up."""
    return _summed_up(_rounds(stock, other, rounds))


def measured_in_pairs(stock: Callable, other: Callable, pairs: int, rounds: int) -> dict[str, float]:
    """The same over the rounds of several pairs of new processes; `stock` and `other` make a step each."""
    found: Rounds = []
    for _ in range(pairs):
        with process(stock) as one, process(other) as two:
            found += _rounds(one, two, rounds)
    return _summed_up(found)


def _rounds(stock: Callable, other: Callable, rounds: int) -> Rounds:
    return [(stock(), other()) for _ in range(rounds + 2)][2:]


def _summed_up(found: Rounds) -> dict[str, float]:
    base, times = ([row[i][0] for row in found] for i in (0, 1))
    return {
        "measured": statistics.median(b / a for a, b in zip(base, times)),
        "rounds": len(found),
        "measured_least": min(times) / min(base),
        "seconds": statistics.median(times),
        "stock_seconds": statistics.median(base),
        "faulted_bytes": statistics.median(row[1][1] for row in found),
        "stock_faulted_bytes": statistics.median(row[0][1] for row in found),
    }
