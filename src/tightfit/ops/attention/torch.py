"""Attention by recomputation: the probabilities are never kept, nor is the output."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tightfit.ops.autograd import refuse_second_derivative
from tightfit.ops.bits import pack, unpack
from tightfit.ops.codec import Codec, Kept
from tightfit.ops.recompute import Joint, recompute
from tightfit.ops.source import attach


def attention(
    call: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    random: bool = False,
    codec: Codec | None = None,
) -> Tensor:
    """A model's own attention, of which q, k, v (and the mask, which all layers share) are kept.

    Args:
        call: from (q, k, v, mask) to the output; its result is returned bit for bit.
        q: (B, H, L, D). k, v: (B, H_kv, S, D), heads not repeated.
        mask: what the model passes, or None.
        random: the call draws dropout.
        codec: keeps q, k and v in its code.

    Returns:
        what `call` returns, usually (B, L, H, D).

    The linear layer behind it forms the gradient of the output first; the attention is then run again with its
    backward, and the layer gets the output for its own weight from there.
    """
    q, k, v = _trimmed(q, k, v)
    if mask is None:
        return recompute(lambda q, k, v: call(q, k, v, None), q, k, v, joint=True, random=random, codec=codec)
    return recompute(call, q, k, v, mask, joint=True, random=random, codec=codec)


def dropout_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    p: float,
    *,
    scale: float | None = None,
    causal: bool = False,
    codec: Codec | None = None,
) -> Tensor:
    """Attention with dropout as torch's math path on a CPU computes it, bit for bit from the same random state.

    Keeps q, k, v and a bit per probability; torch keeps the probabilities, their noise and their product with it, 12
    bytes each. Works on one batch element at a time.

    Args:
        q: (B, H, L, D); k, v: (B, H, S, D).
        mask: boolean (True: attend) or additive, broadcastable to (B, H, L, S); None for none.
        p: dropout probability.
        scale: default 1 / sqrt(D).
        causal: attend only to positions up to one's own.
        codec: keeps q, k and v in its code.

    Returns:
        (B, L, H, D), contiguous.

    Raises:
        RuntimeError: on double backward.
    """
    q, k, v = _trimmed(q, k, v)
    if causal:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
    factor = math.sqrt(1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    joint = _DropoutJoint(p, factor, Kept(codec, q, k, v))
    out, bits, *packed = _DropoutAttention.apply(joint, q, k, v, mask)
    return attach(out, (bits, *(() if mask is None else (mask,)), *(packed or (q, k, v))), joint)


def _trimmed(*tensors: Tensor) -> list[Tensor]:
    """The tensors, copied where keeping one would keep a larger memory alive (a part of a joint projection)."""
    used: dict[int, int] = {}
    for t in tensors:
        key = t.untyped_storage()._cdata
        used[key] = used.get(key, 0) + t.nbytes
    whole = [t.untyped_storage().nbytes() <= used[t.untyped_storage()._cdata] for t in tensors]
    return [t if fits else t.clone(memory_format=torch.contiguous_format) for t, fits in zip(tensors, whole)]


def _wide(t: Tensor) -> Tensor:
    """float32 for what is narrower, as torch's math path computes it."""
    return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t


class _DropoutJoint(Joint):
    """Forward again and backward, one batch element at a time."""

    def __init__(self, p: float, factor: float, coded: Kept):
        super().__init__(self.again)
        self.p, self.factor, self.coded = p, factor, coded

    def inputs_of(self, kept: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """(mask bits, q, k, v, attention mask)"""
        count = (len(kept) - 1) % 3  # an attention mask stands between the bits and q, k, v
        q, k, v = self.coded.again(kept[1 + count :])
        return kept[0], q, k, v, kept[1] if count else None

    def probabilities(self, q: Tensor, k: Tensor, mask: Tensor | None, b: int) -> Tensor:
        """(H, L, S) of one batch element, in the order of operations of torch's math path."""
        scores = (_wide(q[b]) * self.factor) @ (_wide(k[b]).transpose(-2, -1) * self.factor)
        if mask is None:
            return torch.softmax(scores, -1)
        rows = mask.expand(-1, -1, *mask.shape[-2:]) if mask.dim() == 4 else mask[None, None]
        # a row that may look at nothing gets zeros
        return torch._safe_softmax(scores.add_(rows[b if rows.shape[0] > 1 else 0]), -1)

    def noise(self, packed: Tensor, like: Tensor, b: int) -> Tensor:
        scale = torch.ones((), dtype=like.dtype).div_(1 - self.p)
        return unpack(packed[b], like.numel(), scale).view(like.shape)

    def again(self, *kept) -> Tensor:
        packed, q, k, v, mask = self.inputs_of(kept)
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1])
        for b in range(q.shape[0]):
            found = self.probabilities(q, k, mask, b)
            out[b] = (found.mul_(self.noise(packed, found, b)) @ _wide(v[b])).transpose(0, 1)
        return out

    def backward(self, kept, parameters, grad):
        packed, q, k, v, mask = self.inputs_of(kept)
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1])
        grad = grad.view(out.shape)
        grads = [torch.empty_like(t) for t in (q, k, v)]
        for b in range(q.shape[0]):
            found = self.probabilities(q, k, mask, b)
            noise = self.noise(packed, found, b)
            dropped, pull = found * noise, _wide(grad[b]).transpose(0, 1)
            out[b] = (dropped @ _wide(v[b])).transpose(0, 1)
            grads[2][b] = dropped.transpose(-2, -1) @ pull
            slope = (pull @ _wide(v[b]).transpose(-2, -1)).mul_(noise)
            slope = torch._softmax_backward_data(slope, found, -1, found.dtype)
            grads[0][b] = (slope @ (_wide(k[b]) * self.factor)).mul_(self.factor)
            grads[1][b] = (slope.transpose(-2, -1) @ (_wide(q[b]) * self.factor)).mul_(self.factor)
        return out, grads


class _DropoutAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, joint, q, k, v, mask):
        ctx.joint = joint
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1])
        packed = []
        for b in range(q.shape[0]):
            found = joint.probabilities(q, k, mask, b)
            noise = torch.empty_like(found).bernoulli_(1 - joint.p)
            packed.append(pack(noise.bool()))
            out[b] = (found.mul_(noise.div_(1 - joint.p)) @ _wide(v[b])).transpose(0, 1)
        bits, coded = torch.stack(packed), joint.coded.encode(q, k, v)
        ctx.mark_non_differentiable(bits, *coded)
        ctx.save_for_backward(bits, *(() if mask is None else (mask,)), *(coded or (q, k, v)))
        return out, bits, *coded

    @staticmethod
    def backward(ctx, grad, *_):
        refuse_second_derivative("dropout_attention")
        grads = ctx.joint.taken(grad)
        if grads is None:
            grads = ctx.joint.backward(ctx.saved_tensors, (), grad.contiguous())[1]
        return None, *grads, None
