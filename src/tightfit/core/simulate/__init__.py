"""Predicting the memory of a training step without running it.

    from tightfit.core.simulate import simulate
    found = simulate(model, (16, 128))            # or a dict of real tensors; model real, on meta, or transformed
    found.peak_bytes, found.peak_phase, found.peak_module, found.by_category, found.phases, found.saved_bytes

One full step (forward, backward, clipping, optimizer, zero_grad; optimizer state warm) runs on fake tensors under
a tracker, and everything is read from the list of allocations it leaves. The model is never changed and no weights
are needed. `simulate` raises `SimulationError` naming operator and module where a step cannot be simulated.
"""

from __future__ import annotations

from tightfit.core.simulate.batches import example_batch
from tightfit.core.simulate.optimizers import OPTIMIZERS
from tightfit.core.simulate.simulation import Simulation, Timeline, simulate

__all__ = ["OPTIMIZERS", "Simulation", "Timeline", "example_batch", "simulate"]
