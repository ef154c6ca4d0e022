"""One block of logits: its softmax, and the gradient that overwrites it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tightfit.ops import kernels
from tightfit.ops.codec import Codec
from tightfit.ops.linear_cross_entropy.reference import LOW_PRECISION


class How(NamedTuple):
    """Settings of a call."""

    compute_dtype: torch.dtype
    chunk_tokens: int
    scale: float
    softcap: float | None
    ignore_index: int
    label_smoothing: float
    codec: Codec | None = None

    @property
    def sum_dtype(self) -> torch.dtype:
        """What everything behind the products is computed in."""
        return torch.float32 if self.compute_dtype in LOW_PRECISION else self.compute_dtype


class Block:
    """Softmax and gradient of (chunk, K) logits in plain torch."""

    def __init__(self, product: Tensor, how: How):
        self.how = how
        self.logits = capped_(product.to(how.sum_dtype), how)

    def largest(self) -> Tensor:
        """Of a row's logits."""
        return self.logits.amax(dim=1)

    def sum(self) -> Tensor:
        """Of a row's logits."""
        return self.logits.sum(dim=1)

    def at(self, index: Tensor) -> Tensor:
        """A row's logit in column `index` (chunk, 1)."""
        return self.logits.gather(1, index).squeeze(1)

    def total(self, top: Tensor) -> Tensor:
        """Sum of exp(logits - top) of each row; the logits are gone then but for their gradient."""
        self.probs = exp_below(self.logits, top, self.how)
        return self.probs.sum(dim=1)

    def gradient(self, top: Tensor, total: Tensor, index: Tensor, here: Tensor, rows: int) -> Tensor:
        """Of the loss by logits before the cap, without `scale`, in the same memory.

        Args:
            top, total: of all `rows` of the head.
            index: columns of the targets, (chunk, 1), where `here`; elsewhere the target is no row of this block.
        """
        smooth = self.how.label_smoothing
        grad = self.probs.div_(total.unsqueeze(1))
        grad.scatter_add_(1, index, here.to(grad.dtype).mul_(smooth - 1).unsqueeze(1))
        if smooth:
            grad.sub_(smooth / rows)
        if self.how.softcap:
            grad.mul_(cap_slope_(self.logits, self.how.softcap))
        return grad


class KernelBlock(Block):
    """The same by kernels that read the products as they came, and write the gradient in their type."""

    def __init__(self, product: Tensor, how: How):
        from tightfit.ops.linear_cross_entropy import triton

        self.how, self.logits, self.kernels = how, product, triton
        self.top, self.own_total, self.own_sum = triton.statistics(product, how.scale, how.softcap)

    def largest(self) -> Tensor:
        return self.top

    def sum(self) -> Tensor:
        return self.own_sum

    def at(self, index: Tensor) -> Tensor:
        return capped_(super().at(index).to(self.how.sum_dtype), self.how)

    def total(self, top: Tensor) -> Tensor:
        return self.own_total if top is self.top else self.own_total * torch.exp(self.top - top)

    def gradient(self, top: Tensor, total: Tensor, index: Tensor, here: Tensor, rows: int) -> Tensor:
        how, smooth = self.how, self.how.label_smoothing
        target = torch.where(here, index.squeeze(1), -1)
        return self.kernels.gradient_(
            self.logits, top, total, target, how.scale, how.softcap, 1 - smooth, smooth / rows
        )


def block_of(product: Tensor, how: How, *, bias_gradient: bool) -> Block:
    """The block of a product (chunk, K), which it overwrites."""
    # the gradient of the bias sums what is not rounded to low precision yet
    rounded = bias_gradient and how.sum_dtype != how.compute_dtype
    fast = not rounded and product.is_contiguous() and kernels.use(product, dtypes=kernels.HALVES)
    return KernelBlock(product, how) if fast else Block(product, how)


def capped_(logits: Tensor, how: How) -> Tensor:
    """cap(scale * logits), in place."""
    if how.scale != 1.0:
        logits.mul_(how.scale)
    if how.softcap:
        logits.div_(how.softcap).tanh_().mul_(how.softcap)
    return logits


def exp_below(logits: Tensor, top: Tensor, how: How) -> Tensor:
    """exp(logits - top), in place of the logits unless a softcap needs them again for its slope."""
    top = top.unsqueeze(1)
    return (logits - top if how.softcap else logits.sub_(top)).exp_()


def cap_slope_(capped: Tensor, softcap: float) -> Tensor:
    """Derivative of cap(z) from its value, 1 - tanh squared; overwrites the value."""
    return capped.div_(softcap).square_().neg_().add_(1)
