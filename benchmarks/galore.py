"""GaLore, layer by layer (arXiv 2403.03507): each weight is updated in backward, as soon as its gradient is there."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

SETTINGS = {"rank": 128, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}


def updated_in_backward(model: nn.Module) -> None:
    """Hook an optimizer on every parameter: GaLore's for the blocks' weights, as transformers does, plain for others.

    Needs the package galore-torch.
    """
    from galore_torch import GaLoreAdamW

    from tightfit.core import hfmodel

    inside = {p for stack in hfmodel.stacks(model) for b in stack for p in model.get_submodule(b).parameters()}
    for parameter in model.parameters():
        low_rank = SETTINGS if parameter in inside and parameter.dim() == 2 else {}
        optimizer = GaLoreAdamW([{"params": [parameter], **low_rank}], lr=1e-5, no_deprecation_warning=True)
        parameter.register_post_accumulate_grad_hook(functools.partial(_update, optimizer))


def _update(optimizer: torch.optim.Optimizer, _: torch.Tensor) -> None:
    optimizer.step()
    optimizer.zero_grad()


def memory(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    """Measured bytes of the second step: of forward and backward above the weights and the state, and in all."""
    from tightfit.core.memory import allocator_peak, live_bytes, saved_bytes

    def step() -> None:
        model(**batch).loss.backward()

    saved = saved_bytes(step)
    model.zero_grad()
    before = live_bytes()
    updated_in_backward(model)
    step()
    state = live_bytes() - before
    rise = allocator_peak(step) - live_bytes()
    return {
        "peak_bytes": rise,
        "whole_peak_bytes": rise + state + sum(p.nbytes for p in model.parameters()),
        "saved_bytes": saved,
        "state_bytes": state,
        "trainable": sum(p.numel() for p in model.parameters()),
    }
