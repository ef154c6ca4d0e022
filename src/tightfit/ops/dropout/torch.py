"""Dropout whose mask is kept as bits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tightfit.ops import kernels
from tightfit.ops.autograd import first_gradient, refuse_second_derivative, save_beside
from tightfit.ops.bits import pack, unpack
from tightfit.ops.source import Rebuild, attach, source_of


def dropout(x: Tensor, p: float) -> Tensor:
    """`F.dropout` in training, bit for bit from the same random state, keeping one bit per element.

    Stock keeps a float per element on a CPU and a byte on a GPU. Where `x` has a source, so has the output.

    Args:
        x: any shape.
        p: probability of zero, 0 to 1.

    Raises:
        RuntimeError: on double backward.

    Example:
        >>> x = torch.ones(64, requires_grad=True)
        >>> y = dropout(x, 0.5)
        >>> y.sum().backward()
        >>> torch.equal(x.grad, y)
        True

    Deviation from the plan of replaying a seed on a GPU: bits everywhere, 1/8 byte per element.
    """
    if p in (0.0, 1.0) or not torch.is_grad_enabled() or torch.compiler.is_compiling() or not x.requires_grad:
        return F.dropout(x, p, training=True)
    out, packed = _Dropout.apply(x, p)
    source = source_of(x)
    return out if source is None else attach(out, (packed, *source.kept), _behind(source.rebuild, p, x.shape, x.dtype))


def _behind(before: Rebuild, p: float, shape: torch.Size, dtype: torch.dtype):
    def make(packed: Tensor, *kept: Tensor) -> Tensor:
        return _times_noise(before.make(kept, None).view(shape), packed, p, dtype)

    return make


def noise_like(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """What dropout multiplies with (0 or 1 / (1 - p)), drawn as torch draws it, and its mask as bits."""
    if x.is_cuda:
        ones, kept = torch.ops.aten.native_dropout(torch.ones_like(x), p, True)
        return ones, _packed(kept)
    noise = torch.empty_like(x).bernoulli_(1 - p)
    packed = _packed(noise.bool())
    return noise.div_(1 - p), packed


def _packed(mask: Tensor) -> Tensor:
    if kernels.use(mask):
        from tightfit.ops.dropout import triton

        return triton.pack(mask)
    return pack(mask)


def _times_noise(x: Tensor, packed: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    if x.dtype == dtype and kernels.use(x, packed) and dtype in kernels.HALVES:
        from tightfit.ops.dropout import triton

        return triton.times_noise(x, packed, _kept_scale(packed, p, dtype))
    return x * _noise(packed, p, x.shape, dtype)


def _kept_scale(packed: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    """1 / (1 - p) rounded as stock rounds it."""
    return torch.ones((), dtype=dtype, device=packed.device).div_(1 - p)


def _noise(packed: Tensor, p: float, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return unpack(packed, shape.numel(), _kept_scale(packed, p, dtype)).view(shape)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p):
        noise, packed = noise_like(x, p)
        ctx.p = p
        save_beside(ctx, [packed], packed)
        return x * noise, packed

    @staticmethod
    @first_gradient
    def backward(ctx, grad):
        refuse_second_derivative("dropout")
        (packed,) = ctx.saved_tensors
        return _times_noise(grad, packed, ctx.p, grad.dtype), None
