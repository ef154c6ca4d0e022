"""GaLore, layer by layer (arXiv 2403.03507): each weight is updated in backward, as soon as its gradient is there."""

from __future__ import annotations

from typing import Any

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
        parameter.register_post_accumulate_grad_hook(lambda _, own=optimizer: (own.step(), own.zero_grad()))


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
    state, peak = live_bytes() - before, allocator_peak(step)
    return {
        "peak_bytes": peak - live_bytes(),
        "whole_peak_bytes": peak,
        "saved_bytes": saved,
        "state_bytes": state,
        "trainable": sum(p.numel() for p in model.parameters()),
    }
