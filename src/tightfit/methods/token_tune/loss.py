"""The loss over selected tokens: targets in the original order, and what the sum is divided by."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tightfit.methods.token_tune.policies import Selection

IGNORED = -100


def targets_of(labels: Tensor | None, shifted: Tensor | None, *, shifts: bool) -> Tensor:
    """(B, L): the target of each token; of a causal model that is the next one's label, selected or not.

    >>> targets_of(torch.tensor([[5, 6, 7]]), None, shifts=True).tolist()
    [[6, 7, -100]]
    """
    if shifted is not None:
        return shifted
    assert labels is not None
    return F.pad(labels, (0, 1), value=IGNORED)[:, 1:] if shifts else labels


def token_loss(logits: Tensor, targets: Tensor, selection: Selection, *, by_chance: bool, items: Any = None) -> Tensor:
    """Cross entropy over the selected tokens; 0, and connected to the graph, where none has a target.

    Args:
        logits: (B, K, V).
        targets: (B, L), -100 for none.
        selection: the tokens.
        by_chance: each token is divided by its chance of selection, and the sum by the number of all targets, instead
            of by the number of selected ones.
        items: number of all targets of the optimizer's step, over micro-batches and processes, which the trainer knows;
            None: those of this batch. With it, each micro-batch counts by its share of all targets.
    """
    targets = targets.to(logits.device)
    chosen = targets.gather(1, selection.positions).masked_fill(~selection.valid, IGNORED)
    every = targets.ne(IGNORED).sum()
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    flat, classes = logits.reshape(-1, logits.shape[-1]), chosen.reshape(-1)
    if by_chance:
        each = F.cross_entropy(flat, classes, ignore_index=IGNORED, reduction="none")
        total = (each * selection.probability.reciprocal().reshape(-1).to(each.dtype)).sum()
        return total / (_number(items, every) if items is not None else every.clamp_min(1))
    total = F.cross_entropy(flat, classes, ignore_index=IGNORED, reduction="sum")
    count = classes.ne(IGNORED).sum().clamp_min(1)
    if items is None:
        return total / count
    return total * every / (count * _number(items, every))


def _number(items: Any, like: Tensor) -> Any:
    return items.to(like.device) if torch.is_tensor(items) else items
