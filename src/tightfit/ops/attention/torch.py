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

PART_BYTES = 2**20
"""Probabilities, in float32, that attention with dropout computes at once; a batch element at least."""


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
    bytes each. Works on a few batch elements at a time.

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
    """Forward again and backward, some batch elements at a time."""

    def __init__(self, p: float, factor: float, coded: Kept):
        super().__init__(self.again)
        self.p, self.factor, self.coded = p, factor, coded

    def inputs_of(self, kept: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """(mask bits, q, k, v, attention mask)"""
        count = (len(kept) - 1) % 3  # an attention mask stands between the bits and q, k, v
        q, k, v = self.coded.again(kept[1 + count :])
        return kept[0], q, k, v, kept[1] if count else None

    def probabilities(self, q: Tensor, k: Tensor, mask: Tensor | None, part: slice) -> Tensor:
        """(b, H, L, S) of a part of the batch, in the order of operations of torch's math path."""
        scores = (_wide(q[part]) * self.factor) @ (_wide(k[part]).transpose(-2, -1) * self.factor)
        if mask is None:
            return torch.softmax(scores, -1)
        if mask.dim() == 4 and mask.shape[0] > 1:
            mask = mask[part]
        # a row that may look at nothing gets zeros
        return torch._safe_softmax(scores.add_(mask), -1)

    def noise(self, packed: Tensor, like: Tensor, number: int) -> Tensor:
        """What the probabilities of part `number` are multiplied with."""
        scale = torch.ones((), dtype=like.dtype).div_(1 - self.p)
        count = -(-like.numel() // 8)
        # only the last part may be smaller than the others, and it ends with the bits
        start = number * count if (number + 1) * count < packed.numel() else packed.numel() - count
        return unpack(packed[start : start + count], like.numel(), scale).view(like.shape)

    def again(self, *kept) -> Tensor:
        packed, q, k, v, mask = self.inputs_of(kept)
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1])
        for number, part in enumerate(_parts(q, k)):
            found = self.probabilities(q, k, mask, part)
            out[part] = (found.mul_(self.noise(packed, found, number)) @ _wide(v[part])).transpose(1, 2)
        return out

    def backward(self, kept, parameters, grad):
        packed, q, k, v, mask = self.inputs_of(kept)
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1])
        grad = grad.view(out.shape)
        grads = [torch.empty_like(t) for t in (q, k, v)]
        for number, part in enumerate(_parts(q, k)):
            found = self.probabilities(q, k, mask, part)
            noise = self.noise(packed, found, number)
            dropped, pull = found * noise, _wide(grad[part]).transpose(1, 2)
            out[part] = (dropped @ _wide(v[part])).transpose(1, 2)
            grads[2][part] = dropped.transpose(-2, -1) @ pull
            slope = (pull @ _wide(v[part]).transpose(-2, -1)).mul_(noise)
            slope = torch._softmax_backward_data(slope, found, -1, found.dtype)
            grads[0][part] = (slope @ (_wide(k[part]) * self.factor)).mul_(self.factor)
            grads[1][part] = (slope.transpose(-2, -1) @ (_wide(q[part]) * self.factor)).mul_(self.factor)
        return out, grads


def _parts(q: Tensor, k: Tensor) -> list[slice]:
    """Parts of the batch whose probabilities are computed at once: as many elements as keep them in the cache."""
    rows, heads, length, _ = q.shape
    size = max(1, PART_BYTES // max(1, 4 * heads * length * k.shape[-2]))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


class _DropoutAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, joint, q, k, v, mask):
        ctx.joint = joint
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1])
        packed = []
        for part in _parts(q, k):
            found = joint.probabilities(q, k, mask, part)
            noise = torch.empty_like(found).bernoulli_(1 - joint.p)
            packed.append(pack(noise.bool()))
            out[part] = (found.mul_(noise.div_(1 - joint.p)) @ _wide(v[part])).transpose(1, 2)
        bits, coded = torch.cat(packed), joint.coded.encode(q, k, v)
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
