"""The rows of a slot on the device: y = s * (ReLU(h K^T) at each token's own rows) V, with its backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tightfit.ops.autograd import refuse_second_derivative
from tightfit.ops.source import source_of


def sparse_rows(
    h: Tensor,
    slot: Tensor,
    places: Tensor | None,
    *,
    scale: float = 1.0,
    gate: Tensor | None = None,
    link: Tensor | None = None,
    sink: Callable[[Tensor], None] | None = None,
    again: Callable[[], Tensor] | None = None,
) -> Tensor:
    """(M, d): the sum of the values of each token's rows, weighed by the positive part of its scores.

    Keeps h (or what rebuilds it), `places`, the M x k weights and, without `again`, the slot. Needs an M x c buffer
    while it runs, forward and backward.

    Args:
        h: (M, d).
        slot: (c, 2, d): key and value of each resident row, in the dtype to compute in; rows not in use are zero.
        places: (M, k) int32, where each token's rows stand in the slot, -1 for none; None: every token uses all rows.
        scale: s.
        gate: (M, k), multiplied with the positive scores.
        link: (1,), gets the norm of the slot's gradient (zero without a sink), so that a backward comes here even where
            nothing else asks for one, and `torch.autograd.grad` has something to say of the rows.
        sink: is given the gradient of the slot, (c, 2, d), once per backward; None: there is none.
        again: gives the slot once more in backward; then it is not kept.

    Raises:
        RuntimeError: on double backward.

    Example:
        >>> slot = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[0.0, 1.0], [5.0, 5.0]]])
        >>> sparse_rows(torch.tensor([[3.0, 4.0]]), slot, torch.tensor([[0]], dtype=torch.int32)).tolist()
        [[0.0, 6.0]]
    """
    return _SparseRows.apply(h, slot, places, scale, gate, link, sink, again)


class _SparseRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, slot, places, scale, gate, link, sink, again):
        source = source_of(h)
        dtype = h.dtype
        with torch.autocast(h.device.type, enabled=False):
            out, weights = _weighed(h.to(slot.dtype), slot, places, gate)
        if scale != 1.0:
            out *= scale
        ctx.rebuild, kept = (None, (h,)) if source is None else (source.rebuild, source.kept)
        if source is not None:
            source.rebuild.add_user()
        ctx.scale, ctx.sink, ctx.again, ctx.dtype, ctx.cast = scale, sink, again, dtype, slot.dtype
        ctx.shape, ctx.like_link = h.shape, None if link is None else (link.shape, link.dtype)
        ctx.save_for_backward(*kept, places, weights, gate, None if again else slot)
        return out.to(dtype)

    @staticmethod
    def backward(ctx, grad):
        refuse_second_derivative("sparse_rows")
        *kept, places, weights, gate, slot = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            h = (kept[0] if ctx.rebuild is None else ctx.rebuild(kept).reshape(ctx.shape)).to(ctx.cast)
            slot = ctx.again() if slot is None else slot
            grad = grad.to(ctx.cast) if ctx.scale == 1.0 else grad.to(ctx.cast) * ctx.scale
            rows_grad = slot.new_empty(slot.shape) if ctx.sink is not None else None
            find = _backward_of_all if places is None else _backward_of_own
            of_h, of_gate = find(ctx, h, slot, places, weights, gate, grad, rows_grad)
        of_link = None
        if ctx.like_link is not None:
            shape, dtype = ctx.like_link
            of_link = grad.new_zeros(shape, dtype=dtype)
            if rows_grad is not None:
                wide = torch.promote_types(rows_grad.dtype, torch.float32)
                of_link.copy_(torch.linalg.vector_norm(rows_grad, dtype=wide))
        if rows_grad is not None:
            ctx.sink(rows_grad)
        of_h = None if of_h is None else of_h.to(ctx.dtype)
        return of_h, None, None, None, of_gate, of_link, None, None


def _weighed(h, slot, places, gate):
    """The output, and the M x k weights before the gate."""
    buffer = h @ slot[:, 0].t()  # (M, c)
    if places is None:  # the weights are M x c: better computed again in backward
        return buffer.relu_() @ slot[:, 1], None
    at = places.clamp_min(0).long()
    weights = buffer.gather(1, at).relu_().masked_fill_(places < 0, 0.0)
    return _spread(buffer, at, _gated(weights, gate)) @ slot[:, 1], weights


def _backward_of_own(ctx, h, slot, places, weights, gate, grad, rows_grad):
    at = places.clamp_min(0).long()
    buffer = grad @ slot[:, 1].t()  # (M, c)
    of_weights = buffer.gather(1, at)
    of_gate = of_weights * weights if gate is not None else None
    of_scores = _gated(of_weights, gate).masked_fill_(weights <= 0, 0.0)
    del of_weights
    _spread(buffer, at, of_scores)
    of_h = buffer @ slot[:, 0] if ctx.needs_input_grad[0] else None
    if rows_grad is not None:
        torch.mm(buffer.t(), h, out=rows_grad[:, 0])
        _spread(buffer, at, _gated(weights, gate))
        torch.mm(buffer.t(), grad, out=rows_grad[:, 1])
    return of_h, of_gate


def _backward_of_all(ctx, h, slot, places, weights, gate, grad, rows_grad):
    weights = (h @ slot[:, 0].t()).relu_()
    if rows_grad is not None:
        torch.mm(weights.t(), grad, out=rows_grad[:, 1])
    buffer = (grad @ slot[:, 1].t()).masked_fill_(weights <= 0, 0.0)
    del weights
    of_h = buffer @ slot[:, 0] if ctx.needs_input_grad[0] else None
    if rows_grad is not None:
        torch.mm(buffer.t(), h, out=rows_grad[:, 0])
    return of_h, None


def _gated(weights: Tensor, gate: Tensor | None) -> Tensor:
    return weights if gate is None else weights * gate


def _spread(buffer: Tensor, at: Tensor, weights: Tensor) -> Tensor:
    """The buffer (M, c) with each token's weights at its rows, zero elsewhere; in place.

    Adding, not writing: places that a token does not use point to row 0 too, with a weight of zero.
    """
    return buffer.zero_().scatter_add_(1, at, weights)
