"""AdamW on some rows of tensors on the host, each row with its own step count."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from tightfit.ops.sparse_rows.select import Workspace

CHUNK_BYTES = 2**19
"""Rows are updated in chunks of about this size, which stay in the processor's cache."""


@dataclasses.dataclass(frozen=True)
class AdamW:
    """Settings that do not change from step to step."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0


def chunks(touched: np.ndarray, row_bytes: int) -> Iterator[Tensor]:
    """The row numbers in chunks that fit the cache."""
    length = max(1, CHUNK_BYTES // row_bytes)
    for start in range(0, len(touched), length):
        yield torch.from_numpy(touched[start : start + length])


def row_adamw(
    rows: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: np.ndarray,
    touched: np.ndarray,
    lr: float,
    settings: AdamW,
    work: Workspace,
    factor: float = 1.0,
    moved: Callable[[Tensor, Tensor], None] | None = None,
) -> None:
    """Update the touched rows in place and set their gradients to zero; all other rows keep their bits.

    Args:
        rows: (r, n) floating point of any width.
        grad, exp_avg, exp_avg_sq: (r, n) in the dtype to compute in.
        step: (r,) ints: how often each row was updated.
        touched: (t,) distinct row numbers, int64.
        factor: multiplied with the gradient.
        moved: is given row numbers and what was added to these rows, chunk by chunk.

    Example:
        >>> tensors = [torch.zeros(3, 2) for _ in range(4)]
        >>> tensors[1][1] = 5.0
        >>> row_adamw(*tensors, np.zeros(3, int), np.array([1]), 0.125, AdamW(), Workspace())
        >>> (1000 * tensors[0]).round().tolist(), tensors[1].abs().sum().item()
        ([[0.0, 0.0], [-125.0, -125.0], [0.0, 0.0]], 0.0)

    Source: Adam (arXiv 1412.6980) with decoupled decay (arXiv 1711.05101), row by row: a row that got no gradient is
    neither moved by its momentum nor decayed.
    """
    first, second = settings.betas
    dtype, width = grad.dtype, grad.shape[1]

    def gathered(name: str, source: Tensor, index: Tensor) -> Tensor:
        return torch.index_select(source, 0, index, out=work.take(name, (len(index), width), source.dtype))

    for index in chunks(touched, width * dtype.itemsize):
        own = index.numpy()
        step[own] += 1
        turns = step[own].astype(np.float64)
        rate = torch.from_numpy(lr / (1 - first**turns)).to(dtype)[:, None]
        root = torch.from_numpy(np.sqrt(1 - second**turns)).to(dtype)[:, None]
        gradient = gathered("gradient", grad, index)
        if factor != 1.0:
            gradient.mul_(factor)
        mean = gathered("mean", exp_avg, index).lerp_(gradient, 1 - first)
        exp_avg.index_copy_(0, index, mean)
        square = gathered("square", exp_avg_sq, index).mul_(second).addcmul_(gradient, gradient, value=1 - second)
        exp_avg_sq.index_copy_(0, index, square)
        denominator = square.sqrt_().div_(root).add_(settings.eps)
        update = mean.div_(denominator).mul_(rate)
        values = gathered("rows held", rows, index)
        if values.dtype != dtype:
            values = work.take("rows wide", tuple(values.shape), dtype).copy_(values)
        before = work.take("rows before", tuple(values.shape), dtype).copy_(values) if moved is not None else None
        if settings.weight_decay:
            values.mul_(1 - lr * settings.weight_decay)
        values.sub_(update)
        if values.dtype != rows.dtype:
            narrow = work.take("rows narrow", tuple(values.shape), rows.dtype).copy_(values)
            rows.index_copy_(0, index, narrow)
            values.copy_(narrow)
        else:
            rows.index_copy_(0, index, values)
        if moved is not None and before is not None:
            moved(index, torch.sub(values, before, out=before))
        grad.index_fill_(0, index, 0.0)
