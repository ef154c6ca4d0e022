"""What methods share that give a model's output other logits, from rows of their own beside a frozen model."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tightfit.core.calls import evaluating
from tightfit.ops.replay import drops, own_casts


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """The model runs without a graph, and without dropout in training; it does not leave its casts to autocast."""
    with torch.no_grad(), own_casts():
        still = model.training and drops(model)
        with evaluating(m for m in model.modules() if m is not model) if still else contextlib.nullcontext():
            yield


def answered(model: Any, out: Any, logits: Tensor, call: dict[str, Any], labels: Tensor | None, classes: int) -> Any:
    """A model's output with other logits, and their loss; its own logits are `old_logits` where it has fields.

    The loss is the one that the config's `problem_type` names, where labels are not integers; those are classes.

    Args:
        call: the arguments of the call by name, of which the loss takes what the Trainer counts.
        labels: None for no loss.
        classes: of the logits.
    """
    loss = None
    if labels is not None:
        kind = getattr(model.config, "problem_type", None) if labels.is_floating_point() else None
        config = types.SimpleNamespace(num_labels=classes, problem_type=kind)
        items = {key: call[key] for key in ("num_items_in_batch",) if key in call}
        loss = model.loss_function(labels, logits, config, **items)
    if isinstance(out, tuple):
        return (logits, *out[1:]) if loss is None else (loss, logits, *out[1:])
    old = out.logits
    out.logits = logits
    if loss is not None:
        out = type(out)(**{**dict(out.items()), "loss": loss})
    out.old_logits = old.detach()
    return out
