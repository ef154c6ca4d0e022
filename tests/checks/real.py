"""A real step beside the plan of it, and beside the same step over two processes."""

from __future__ import annotations

import gc

import pytest
import torch

from tightfit.core.memory import allocator_peak, live_bytes, saved_bytes
from tightfit.core.simulate import simulate


def assert_planned_as_real(model, applied, batch) -> None:
    """The bytes saved for backward are those of the plan, and the peak is within the few of labels and the like."""
    gc.collect()
    optimizer = applied.optimizer(torch.optim.SGD, lr=0.0)

    def step():
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    planned = simulate(model, batch, optimizer="sgd")
    assert saved_bytes(step) == planned.saved_bytes
    own = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())}
    own |= {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in batch.values()}
    others = live_bytes() - sum(own.values())
    assert allocator_peak(step) - others == pytest.approx(planned.peak_bytes, abs=256)


def gradient_over_ranks(rank, wrapped, model, batches, gradients) -> tuple[bool, float] | None:
    """In rank 0: whether the same parameters have gradients as in one process, and how far they are off at most.

    Args:
        gradients: (model, batch) -> (loss, name -> gradient), in one process.
    """
    wrapped(**batches[rank]).loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    if rank:
        return None
    each = [gradients(model, batch)[1] for batch in batches]
    wanted = {n: (each[0][n] + each[1][n]) / 2 for n in each[0]}
    off = max(float((found[n] - g).norm() / (g.norm() + 1e-6)) for n, g in wanted.items())
    return set(found) == set(wanted), off
