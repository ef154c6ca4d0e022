"""`linear` with an own backward: what it keeps of its input is the input's source, where there is one.

Else it keeps the input, or what a codec makes of it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tightfit.ops.autograd import cast_for_autocast, no_view, refuse_second_derivative
from tightfit.ops.codec import Codec, Like, outer, pack_once, rows_of
from tightfit.ops.source import Source, attach, source_of


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    transposed: bool = False,
    sole: bool = True,
    codec: Codec | None = None,
) -> Tensor:
    """y = x W^T + b, bit for bit `F.linear`; keeps nothing of x that another operator keeps already.

    Args:
        x: (..., I) floating point.
        weight: (O, I). If it takes no gradient, this is `F.linear` itself.
        bias: (O,) or None.
        transposed: the weight is (I, O), as in GPT-2's Conv1D.
        sole: nothing else uses x, so its gradient from here is its whole gradient.
        codec: what is kept of x where nothing rebuilds it, and how the weight gradient is formed. The gradients of x
            and of the bias stay exact.

    Raises:
        RuntimeError: on double backward.

    Example:
        >>> x, w = torch.ones(3, 4, requires_grad=True), torch.ones(2, 4, requires_grad=True)
        >>> linear(x, w).sum().backward()
        >>> w.grad.tolist()
        [[3.0, 3.0, 3.0, 3.0], [3.0, 3.0, 3.0, 3.0]]

    The weight gradient is one product over flattened rows. Under autocast the input is cast as torch would, and what
    is kept is the source of the input before the cast.
    """
    if not (torch.is_grad_enabled() and weight.requires_grad) or torch.compiler.is_compiling():
        return F.linear(x, weight.t() if transposed else weight, bias)
    if codec is not None and not x.is_floating_point():
        raise TypeError(f"linear: the input is {x.dtype}; a codec keeps floating point, so cast it before")
    if codec is not None and (x.shape[-1] < codec.least or not x.numel()):
        codec = None
    return _Linear.apply(x, weight, bias, transposed, sole, codec)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, transposed, sole, codec):
        cast, weight_cast, bias_cast = cast_for_autocast(x, weight, bias)
        ctx.rebuild, ctx.like, ctx.codec, ctx.packer = None, Like(x.shape, cast.dtype), codec, None
        ctx.input_dtype, ctx.transposed, ctx.sole = x.dtype, transposed, sole
        source, packed = source_of(x), None
        if source is None and codec is not None:
            packed = pack_once(x, cast, codec)
            if codec.rebuilds:
                like = ctx.like
                attach(x, packed.tensors, lambda *kept: codec.decode(kept, like.shape, like.dtype))
                source = source_of(x)
        if source is not None:
            noted = None if codec is None else _noted(x, source, codec)
            if noted is None:
                source.rebuild.add_user()
            ctx.rebuild = source.rebuild
            ctx.save_for_backward(weight, noted, *source.kept)
        elif packed is not None:
            ctx.packer = packed.codec  # that of the sibling which packed first
            ctx.save_for_backward(weight, None, *packed.tensors)
        else:
            ctx.save_for_backward(weight, None, cast)
        with torch.autocast(x.device.type, enabled=False):
            return no_view(F.linear(cast, weight_cast.t() if transposed else weight_cast, bias_cast))

    @staticmethod
    def backward(ctx, grad):
        refuse_second_derivative("linear")
        weight, noted, *kept = ctx.saved_tensors
        grad_rows = grad.reshape(-1, grad.shape[-1])
        # a source that finishes its own backward here needs the input's gradient; else the rebuilt input goes first
        joint = ctx.sole and ctx.rebuild is not None and ctx.rebuild.joint
        with torch.autocast(grad.device.type, enabled=False):
            grad_x = _input_grad(ctx, grad_rows, weight) if joint else None
            if ctx.packer is not None:
                grad_w = ctx.packer.weight_grad(kept, grad_rows, ctx.like, ctx.transposed)
            elif noted is not None:
                rows = lambda index: ctx.rebuild.rows(kept, index).to(ctx.like.dtype)  # noqa: E731
                grad_w = ctx.codec.weight_grad_of_rows(grad_rows, noted, rows, ctx.transposed)
            else:
                x = kept[0] if ctx.rebuild is None else ctx.rebuild(kept, grad_x)
                form = outer if ctx.codec is None else ctx.codec.weight_grad_of
                grad_w = form(grad_rows, x.reshape(-1, ctx.like.shape[-1]).to(ctx.like.dtype), ctx.transposed)
                del x
            grad_b = grad_rows.sum(0).to(weight.dtype) if ctx.needs_input_grad[2] else None
            if not joint:
                grad_x = _input_grad(ctx, grad_rows, weight)
        return grad_x, grad_w.to(weight.dtype), grad_b, None, None, None


def _noted(x: Tensor, source: Source, codec: Codec) -> Tensor | None:
    """What the codec notes of x, where it can have chosen rows of it in backward."""
    n = rows_of(x.shape)
    alike = all(t.dim() > 0 and rows_of(t.shape) == n for t in source.kept)
    return codec.note(x.reshape(n, x.shape[-1])) if source.rebuild.rowwise and alike else None


def _input_grad(ctx, grad_rows: Tensor, weight: Tensor) -> Tensor | None:
    if not ctx.needs_input_grad[0]:
        return None
    matrix = weight.to(grad_rows.dtype)
    grad_x = grad_rows @ (matrix.t() if ctx.transposed else matrix)
    return grad_x.view(ctx.like.shape).to(ctx.input_dtype)


def add_scaled(result: Tensor, update: Tensor, factor: float) -> Tensor:
    """result + update * factor, bit for bit, in the memory of `update` (an adapter's output, which nobody keeps).

    Example:
        >>> add_scaled(torch.ones(2), torch.ones(2), 0.5).tolist()
        [1.5, 1.5]
    """
    return _AddScaled.apply(result, update, factor)


class _AddScaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, result, update, factor):
        ctx.factor = factor
        ctx.mark_dirty(update)
        return update.mul_(factor).add_(result)

    @staticmethod
    def backward(ctx, grad):
        return grad, grad if ctx.factor == 1 else grad * ctx.factor, None
