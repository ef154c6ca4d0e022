"""Chunked `linear_cross_entropy`: the logits exist for one block of tokens at a time.

For the trainable rows a block of tokens sees all K rows, its softmax is turned into the gradient of the
logits in place, and the products with `weight` and `hidden` are taken at once, in the forward: nothing is
computed twice. The loss is a scalar, so the backward only multiplies by the incoming number. With
`reduction="none"` that number differs per token and the products have to wait: the backward computes each
block of logits again.

The frozen rows are walked block by block in the outer loop, so that a table on the host crosses to the
device once. Their softmax cannot be normalised before all rows were seen; a running maximum per token, with
rescaling, makes one pass enough for log-sum-exp and gradient together, as flash attention does.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tightfit.ops.autograd import autocast_dtype
from tightfit.ops.codec import Codec
from tightfit.ops.linear_cross_entropy.blocks import How, block_of, cap_slope_, capped_, exp_below
from tightfit.ops.linear_cross_entropy.reference import LOW_PRECISION, HeadLoss, check_settings, check_tensors

BLOCK_BYTES = 16 * 2**20
MIN_BLOCK_TOKENS = 64


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
    codec: Codec | None = None,
) -> Tensor | HeadLoss:
    """Cross-entropy of a linear head without its (tokens x vocabulary) logits.

    Equal to `F.cross_entropy(logits.float(), target, ...)` with `logits = cap(scale * (hidden @ W.T + b))`,
    where W is `weight` followed by `frozen_weight` and `cap(z) = softcap * tanh(z / softcap)`. Gradients
    reach `hidden`, `weight` and `bias` exactly; the frozen rows take part in the softmax and in the gradient
    of `hidden` but never receive one. When both halves together are a full head this is the full loss, and
    the training of a head whose frozen rows stay, not of one that trains all rows.

    Memory: one block of `chunk_tokens` x K logits in float32 (two with `softcap` or low precision), and from
    forward to backward a gradient each for `hidden` and `weight` (float32 for bfloat16 and float16 weights).
    With `reduction="none"` the inputs are kept instead and the logits computed again in the backward. A
    frozen half adds two (N, d) buffers during the pass, and nothing that grows with D. Without gradients
    (no_grad, or no input that requires one) only the block of logits is held.

    Args:
        hidden: (..., d) floating point, N = number of leading positions.
        weight: (K, d), of the dtype of `hidden` unless autocast is on.
        target: (...) int64. 0..K-1 is a row of `weight`, K..K+D-1 a row of `frozen_weight`.
        bias: (K,) or None.
        frozen_weight: (D, d) or None; any device and floating dtype, moved and converted in blocks.
        frozen_bias: (D,) or None.
        scale: factor on the logits.
        softcap: bound of the logits, applied after `scale`; None for no bound.
        ignore_index: target without loss and gradient.
        reduction: "mean" over the tokens not ignored, "sum", or "none" (the shape of `target`). For a mean
            over several batches (`num_items_in_batch`) take "sum" and divide. If all tokens are ignored, or
            there are none, the mean is NaN with gradient 0 and the sum is 0, as in torch.
        label_smoothing: spread evenly over all K + D rows.
        chunk_tokens: tokens per block; by default as many as keep a block within 16 MiB, at least 64.
        return_frozen_mass: return `HeadLoss(loss, frozen_mass)`. With p the frozen mass of a token, its loss
            over all rows minus its loss over the trainable ones alone is `-log(1 - p)`.
        codec: estimates the gradient of `weight`, block by block; all else stays exact. None: exact too.

    Raises:
        ValueError, TypeError: shapes, dtypes or settings that do not fit together.
        IndexError: a target out of range, on a CPU; elsewhere an asynchronous assertion fails.
        RuntimeError: on double backward, which is not supported.

    >>> hidden = torch.zeros(2, 3, requires_grad=True)
    >>> loss = linear_cross_entropy(hidden, torch.ones(4, 3), torch.tensor([0, -100]), reduction="sum")
    >>> round(loss.item(), 4)  # log 4
    1.3863

    Low precision: products are taken in the dtype of the inputs (or autocast's) and rounded to it, as a stock
    head does; everything from the logits to their gradient is float32, and the weight gradient is summed in
    float32, since a block's share below 1/256 of the sum would vanish in a bfloat16 buffer. Scale and softcap
    act on the float32 logits, where stock models round once more.

    Source: the split of the log-sum-exp and the identity above follow from its definition; the running
    maximum after arXiv 2205.14135, section 3.1.
    """
    check_tensors(hidden, weight, target, bias, frozen_weight, frozen_bias, ignore_index)
    check_settings(softcap, reduction, label_smoothing, chunk_tokens)
    if frozen_weight is not None and frozen_weight.shape[0] == 0:
        frozen_weight = frozen_bias = None
    tensors = _Tensors(
        hidden=hidden.reshape(-1, hidden.shape[-1]),
        weight=weight,
        bias=bias,
        target=target.reshape(-1).long(),
        frozen_weight=None if frozen_weight is None else frozen_weight.detach(),
        frozen_bias=None if frozen_bias is None else frozen_bias.detach(),
    )
    how = How(
        compute_dtype=autocast_dtype(hidden.device.type) or hidden.dtype,
        chunk_tokens=chunk_tokens or block_tokens(weight.shape[0]),
        scale=float(scale),
        softcap=None if softcap is None else float(softcap),
        ignore_index=ignore_index,
        label_smoothing=float(label_smoothing),
        codec=None if codec is None or weight.shape[1] < codec.least else codec,
    )
    loss, mass = _LinearCrossEntropy.apply(*tensors, how, reduction, torch.is_grad_enabled())
    if reduction == "none":
        loss = loss.view(target.shape)
    return HeadLoss(loss, mass) if return_frozen_mass else loss


def block_tokens(rows: int) -> int:
    """Tokens whose float32 logits over `rows` rows fit 16 MiB: a multiple of 64, at least 64.

    >>> block_tokens(32_000), block_tokens(262_144)
    (128, 64)
    """
    fitting = BLOCK_BYTES // (4 * rows)
    return max(MIN_BLOCK_TOKENS, fitting // MIN_BLOCK_TOKENS * MIN_BLOCK_TOKENS)


class _Tensors(NamedTuple):
    hidden: Tensor  # (N, d)
    weight: Tensor  # (K, d)
    bias: Tensor | None  # (K,)
    target: Tensor  # (N,)
    frozen_weight: Tensor | None  # (D, d)
    frozen_bias: Tensor | None  # (D,)


class _Wanted(NamedTuple):
    hidden: bool = False
    weight: bool = False
    bias: bool = False


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, target, frozen_weight, frozen_bias, how, reduction, grad_enabled):
        tensors = _Tensors(hidden, weight, bias, target, frozen_weight, frozen_bias)
        wanted = _Wanted(*[grad_enabled and needs for needs in ctx.needs_input_grad[:3]])
        ctx.how, ctx.reduction, ctx.wanted = how, reduction, wanted
        ctx.dtypes = [None if t is None else t.dtype for t in tensors[:3]]
        if reduction == "none":
            loss, mass, _ = _chunked(tensors, how, _Wanted())
            if any(wanted):
                ctx.save_for_backward(*tensors)
        else:
            losses, mass, grads = _chunked(tensors, how, wanted)
            loss, count = losses.sum(), None
            if reduction == "mean":
                count = (target != how.ignore_index).sum()
                loss = loss / count
            if any(wanted):
                ctx.save_for_backward(count, *grads)
        ctx.mark_non_differentiable(mass)
        return loss, mass

    @staticmethod
    def backward(ctx, grad_loss, _grad_mass):
        # once_differentiable would let the second derivative vanish silently under a plain `loss.backward()`
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "linear_cross_entropy cannot be differentiated twice, and create_graph=True asks for it; "
                "use F.cross_entropy on full logits"
            )
        if ctx.reduction == "none":
            _, _, sums = _chunked(_Tensors(*ctx.saved_tensors), ctx.how, ctx.wanted, grad_loss)
            grads = [None if g is None else g.to(dtype) for g, dtype in zip(sums, ctx.dtypes)]
        else:
            count, *sums = ctx.saved_tensors
            # With all tokens ignored 0 / 1 leaves zeros, as the backward of torch's cross-entropy does.
            factor = grad_loss if count is None else grad_loss / count.clamp(min=1)
            reuse = _graph_is_freed()
            grads = [None if g is None else _scaled(g, factor, t, reuse) for g, t in zip(sums, ctx.dtypes)]
        return *grads, None, None, None, None, None, None


def _chunked(
    tensors: _Tensors, how: How, wanted: _Wanted, token_factor: Tensor | None = None
) -> tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """Losses (N,), frozen mass (N,), and the wanted gradients of `sum(token_factor * losses)`.

    The gradient of `weight` and `bias` comes in the dtype it was summed in, that of `hidden` in its own.
    """
    with _no_autocast(tensors.hidden.device.type):
        hidden, target = tensors.hidden, tensors.target
        weight = tensors.weight.to(how.compute_dtype)
        bias = None if tensors.bias is None else tensors.bias.to(how.compute_dtype)
        kept, rows = weight.shape[0], _all_rows(tensors)
        smooth, sum_dtype = how.label_smoothing, how.sum_dtype

        valid = target != how.ignore_index
        factor = valid.to(sum_dtype) * how.scale
        if token_factor is not None:
            factor = factor * token_factor
        losses = hidden.new_zeros(hidden.shape[0], dtype=sum_dtype)
        mass = torch.zeros_like(losses)
        d_hidden = torch.empty_like(hidden) if wanted.hidden else None
        d_weight = torch.zeros_like(weight, dtype=sum_dtype) if wanted.weight else None
        d_bias = torch.zeros_like(bias, dtype=sum_dtype) if wanted.bias and bias is not None else None
        frozen = _frozen_half(tensors, how, wanted.hidden)

        for part in _parts(hidden.shape[0], how.chunk_tokens):
            block = d_logits = None  # before the next block, or two are alive at once
            inputs = hidden[part].to(how.compute_dtype)
            block = block_of(F.linear(inputs, weight, bias), how, bias_gradient=d_bias is not None)  # (chunk, K)
            here = valid[part] & (target[part] < kept)
            index = torch.where(here, target[part], 0).unsqueeze(1)
            target_logit = torch.where(here, block.at(index), 0)
            logit_sum = block.sum() if smooth else target_logit  # unused without smoothing
            top = block.largest()
            if frozen is not None:
                top = torch.maximum(top, frozen.top[part])
                target_logit += frozen.target_logit[part]
                if smooth:
                    logit_sum += frozen.logit_sum[part]

            total = block.total(top)
            if frozen is not None:
                frozen_scale = torch.exp(frozen.top[part] - top)
                frozen_total = frozen.total[part] * frozen_scale
                total += frozen_total
                mass[part] = frozen_total / total
            # top - z_y first: both can be large where the loss is small
            loss = total.log() + (1 - smooth) * (top - target_logit)
            if smooth:
                loss += smooth * (top - logit_sum / rows)
            losses[part] = torch.where(valid[part], loss, 0)
            if not any(wanted):
                continue

            d_logits = block.gradient(top, total, index, here, rows)
            token = factor[part].unsqueeze(1)  # multiplied into (chunk, d), not into (chunk, K)
            if d_bias is not None:
                d_bias.addmv_(d_logits.t(), factor[part])
            d_logits = d_logits.to(how.compute_dtype)
            if d_hidden is not None:
                pull = d_logits @ weight
                if frozen is not None:
                    pull = pull + frozen.pull[part] * (frozen_scale / total).unsqueeze(1) - frozen.direct[part]
                d_hidden[part] = pull * token
            if d_weight is not None:
                _add_product(d_weight, *_sampled(d_logits, (inputs * token).to(how.compute_dtype), how))
        return losses, mass, (d_hidden, d_weight, d_bias)


class _FrozenHalf(NamedTuple):
    """What the frozen rows contribute, per token, before the logits of the trainable rows are known."""

    top: Tensor  # largest logit
    total: Tensor  # sum of exp(z - top)
    target_logit: Tensor  # 0 where the target is no frozen row
    logit_sum: Tensor  # filled for label smoothing
    pull: Tensor  # (N, d): sum of exp(z - top) * dz/dh, without `scale`; (0, d) if no gradient is wanted
    direct: Tensor  # of the same shape: sum of (smoothed target) * dz/dh, without `scale`


def _frozen_half(tensors: _Tensors, how: How, want_grad: bool) -> _FrozenHalf | None:
    hidden, weight, _, target, frozen_weight, frozen_bias = tensors
    if frozen_weight is None:
        return None
    target = target - weight.shape[0]
    tokens, width = hidden.shape
    smooth, sum_dtype = how.label_smoothing, how.sum_dtype
    top = hidden.new_full((tokens,), -torch.inf, dtype=sum_dtype)
    total, target_logit, logit_sum = (torch.zeros_like(top) for _ in range(3))
    pull, direct = (hidden.new_zeros(tokens if want_grad else 0, width, dtype=sum_dtype) for _ in range(2))

    chunk = min(how.chunk_tokens, 1024)
    for rows in _parts(frozen_weight.shape[0], max(1, BLOCK_BYTES // (4 * max(width, chunk)))):
        block = _fetched(frozen_weight[rows], hidden.device, how)
        bias = None if frozen_bias is None else _fetched(frozen_bias[rows], hidden.device, how)
        for part in _parts(tokens, chunk):
            logits = probs = slope = None  # before the next block, or two are alive at once
            # (chunk, rows)
            logits = capped_(F.linear(hidden[part].to(how.compute_dtype), block, bias).to(sum_dtype), how)
            here = (target[part] >= rows.start) & (target[part] < rows.stop)
            index = torch.where(here, target[part] - rows.start, 0)
            picked = logits.gather(1, index.unsqueeze(1)).squeeze(1)
            target_logit[part] += torch.where(here, picked, 0)
            if smooth:
                logit_sum[part] += logits.sum(dim=1)
            new_top = torch.maximum(top[part], logits.amax(dim=1))
            rescale = torch.exp(top[part] - new_top)
            top[part] = new_top
            probs = exp_below(logits, new_top, how)
            total[part] = total[part] * rescale + probs.sum(dim=1)
            if not want_grad:
                continue

            share = here.to(sum_dtype).mul_(1 - smooth)
            if how.softcap:
                share *= cap_slope_(picked, how.softcap)
                slope = cap_slope_(logits, how.softcap)
                probs *= slope
            pull[part] = pull[part] * rescale.unsqueeze(1) + probs.to(how.compute_dtype) @ block
            direct[part] += share.unsqueeze(1) * block.index_select(0, index)
            if smooth:
                spread = block.sum(dim=0) if slope is None else slope.to(how.compute_dtype) @ block
                direct[part] += smooth / _all_rows(tensors) * spread
    return _FrozenHalf(top, total, target_logit, logit_sum, pull, direct)


def _parts(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _all_rows(tensors: _Tensors) -> int:
    frozen = 0 if tensors.frozen_weight is None else tensors.frozen_weight.shape[0]
    return tensors.weight.shape[0] + frozen


def _fetched(rows: Tensor, device: torch.device, how: How) -> Tensor:
    return rows.to(device, non_blocking=True).to(how.compute_dtype)


def _sampled(d_logits: Tensor, inputs: Tensor, how: How) -> tuple[Tensor, Tensor]:
    return (d_logits, inputs) if how.codec is None else how.codec.sampled(d_logits, inputs)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left.T @ right, where a low-precision product must not stand in full beside the total."""
    if left.dtype == total.dtype:
        total.addmm_(left.t(), right)
        return
    for rows in _parts(total.shape[0], max(1, BLOCK_BYTES // (4 * total.shape[1]))):
        total[rows] += left[:, rows].t() @ right


def _scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype, reuse: bool) -> Tensor:
    if grad.dtype in LOW_PRECISION:  # through float32: a loss scale of 65536 is no float16 number
        return (grad.float() * factor).to(dtype)
    return (grad.mul_(factor) if reuse else grad * factor).to(dtype)


def _graph_is_freed() -> bool:
    """True in a backward that drops its saved tensors, which then may be overwritten. False if unsure."""
    if torch.compiler.is_compiling():
        return False
    is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return is_kept is not None and not is_kept()


def _no_autocast(device_type: str) -> AbstractContextManager:
    if autocast_dtype(device_type) is None:
        return nullcontext()
    return torch.autocast(device_type, enabled=False)
