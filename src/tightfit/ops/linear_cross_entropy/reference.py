"""The readable form of `linear_cross_entropy`: full logits, plain autograd. The oracle for the fast one.

The argument checks and the result type live here because both implementations share them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from tightfit.ops.autograd import autocast_dtype

LOW_PRECISION = (torch.bfloat16, torch.float16)


class HeadLoss(NamedTuple):
    """A loss and, per token, the probability the model puts on the frozen half of the head.

    `frozen_mass` is (N,) with N = number of targets in reading order, detached, and filled in for ignored
    tokens too; it is all zeros when there is no frozen half.
    """

    loss: Tensor
    frozen_mass: Tensor


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    frozen_weight: Tensor | None = None,
    frozen_bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    chunk_tokens: int | None = None,
    return_frozen_mass: bool = False,
) -> Tensor | HeadLoss:
    """Cross-entropy of `hidden @ [weight; frozen_weight].T`, written as its definition.

    Holds all logits several times; `chunk_tokens` is checked and otherwise ignored. Arguments, results and
    errors are those of `tightfit.ops.linear_cross_entropy.linear_cross_entropy`.

    >>> loss = linear_cross_entropy(torch.zeros(2, 3), torch.ones(4, 3), torch.tensor([0, 3]))
    >>> round(loss.item(), 4)  # log 4
    1.3863
    """
    check_tensors(hidden, weight, target, bias, frozen_weight, frozen_bias, ignore_index)
    check_settings(softcap, reduction, label_smoothing, chunk_tokens)

    logits = F.linear(hidden, weight, bias)
    if frozen_weight is not None:
        rows = frozen_weight.detach().to(hidden.device, weight.dtype)
        row_bias = None if frozen_bias is None else frozen_bias.detach().to(hidden.device, weight.dtype)
        logits = torch.cat([logits, F.linear(hidden, rows, row_bias)], dim=-1)
    if logits.dtype in LOW_PRECISION:
        logits = logits.float()
    logits = scale * logits.reshape(-1, logits.shape[-1])  # (N, K + D)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)

    loss = F.cross_entropy(
        logits,
        target.reshape(-1).long(),
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    if reduction == "none":
        loss = loss.view(target.shape)
    if not return_frozen_mass:
        return loss
    return HeadLoss(loss, logits.detach().softmax(dim=-1)[:, weight.shape[0] :].sum(dim=-1))


def check_tensors(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    frozen_weight: Tensor | None,
    frozen_bias: Tensor | None,
    ignore_index: int,
) -> None:
    """Raise ValueError, TypeError or IndexError for tensors that do not fit together."""
    if weight.dim() != 2 or weight.shape[0] == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; expected (K, d) with at least one row")
    rows, width = weight.shape
    if hidden.dim() < 1 or hidden.shape[-1] != width:
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}; expected (..., {width}), as in weight")
    if target.shape != hidden.shape[:-1]:
        raise ValueError(
            f"target has shape {tuple(target.shape)}; expected {tuple(hidden.shape[:-1])}, "
            "that of hidden without its last axis"
        )
    if target.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"target has dtype {target.dtype}; expected int64 row numbers (int32 is accepted)")
    if hidden.dtype != weight.dtype and autocast_dtype(hidden.device.type) is None:
        raise TypeError(f"hidden is {hidden.dtype} but weight is {weight.dtype}; convert one or use autocast")
    _check_bias("bias", bias, rows)
    if frozen_weight is not None:
        if frozen_weight.dim() != 2 or frozen_weight.shape[1] != width:
            raise ValueError(f"frozen_weight has shape {tuple(frozen_weight.shape)}; expected (D, {width})")
        _check_bias("frozen_bias", frozen_bias, frozen_weight.shape[0])
        rows += frozen_weight.shape[0]
    elif frozen_bias is not None:
        raise ValueError("frozen_bias was given without frozen_weight; pass both or neither")
    _check_targets(target, rows, ignore_index)


def check_settings(softcap: float | None, reduction: str, label_smoothing: float, chunk_tokens: int | None) -> None:
    """Raise ValueError for a setting outside its range."""
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}; expected a positive number, or None for no cap")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is {reduction!r}; expected 'mean', 'sum' or 'none'")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing is {label_smoothing}; expected a number between 0 and 1")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; expected at least 1, or None for the default")


def _check_targets(target: Tensor, rows: int, ignore_index: int) -> None:
    """On a CPU the error names the value. Elsewhere, and in a compiled graph, the check is an asynchronous
    assertion, because reading the value would stop the device; fake tensors have no values to check."""
    device = target.device.type
    if device == "meta" or (not torch.compiler.is_compiling() and is_fake(target)):
        return
    wrong = ((target < 0) | (target >= rows)) & (target != ignore_index)
    allowed = f"allowed are 0..{rows - 1} and ignore_index {ignore_index}"
    if device != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(~wrong.any(), f"a target is no row of the head: {allowed}")
    elif wrong.any():
        raise IndexError(
            f"target {int(target[wrong][0])} is no row of the head ({int(wrong.sum())} such among "
            f"{target.numel()}); {allowed}. Map the labels to row numbers first"
        )


def _check_bias(name: str, bias: Tensor | None, rows: int) -> None:
    if bias is not None and bias.shape != (rows,):
        raise ValueError(f"{name} has shape {tuple(bias.shape)}; expected ({rows},), one number per row")
