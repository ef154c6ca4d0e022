"""`linear` with an own backward: what it keeps of its input is the input's source, where there is one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tightfit.ops.autograd import cast_for_autocast, refuse_second_derivative
from tightfit.ops.source import source_of


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, transposed: bool = False, sole: bool = True
) -> Tensor:
    """y = x W^T + b, bit for bit `F.linear`; keeps nothing of x that another operator keeps already.

    Args:
        x: (..., I) floating point.
        weight: (O, I). If it takes no gradient, this is `F.linear` itself.
        bias: (O,) or None.
        transposed: the weight is (I, O), as in GPT-2's Conv1D.
        sole: nothing else uses x, so its gradient from here is its whole gradient.

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
    return _Linear.apply(x, weight, bias, transposed, sole)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, transposed, sole):
        source = source_of(x)
        cast, weight_cast, bias_cast = cast_for_autocast(x, weight, bias)
        ctx.rebuild, ctx.dtype, ctx.shape = None, cast.dtype, x.shape
        ctx.input_dtype, ctx.transposed, ctx.sole = x.dtype, transposed, sole
        if source is None:
            ctx.save_for_backward(weight, cast)
        else:
            source.rebuild.add_user()
            ctx.rebuild = source.rebuild
            ctx.save_for_backward(weight, *source.kept)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(cast, weight_cast.t() if transposed else weight_cast, bias_cast)

    @staticmethod
    def backward(ctx, grad):
        refuse_second_derivative("linear")
        weight, *kept = ctx.saved_tensors
        grad_rows = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_w = grad_b = None
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                matrix = weight.to(grad.dtype)
                grad_x = grad_rows @ (matrix.t() if ctx.transposed else matrix)
                grad_x = grad_x.view(ctx.shape).to(ctx.input_dtype)
            # before the weight's: a source may finish its own backward with it
            x = kept[0] if ctx.rebuild is None else ctx.rebuild(kept, grad_x if ctx.sole else None)
            rows = x.reshape(-1, ctx.shape[-1]).to(ctx.dtype)
            if ctx.needs_input_grad[1]:
                grad_w = (rows.t() @ grad_rows if ctx.transposed else grad_rows.t() @ rows).to(weight.dtype)
            if ctx.needs_input_grad[2]:
                grad_b = grad_rows.sum(0).to(weight.dtype)
        return grad_x, grad_w, grad_b, None, None
