"""Attention by recomputation: the probabilities are never kept, nor is the output."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tightfit.ops.autograd import (
    autocast_dtype,
    cast_for_autocast,
    first_gradient,
    refuse_second_derivative,
    save_beside,
)
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
    parameters: tuple[Tensor, ...] = (),
    random: bool = False,
    codec: Codec | None = None,
) -> Tensor:
    """A model's own attention, of which q, k, v (and the mask, which all layers share) are kept.

    Args:
        call: from (q, k, v, mask) to the output; its result is returned bit for bit.
        q: (B, H, L, D). k, v: (B, H_kv, S, D), heads not repeated.
        mask: what the model passes, or None.
        parameters: what else the call reads that takes a gradient, such as a bias on the scores.
        random: the call draws dropout.
        codec: keeps q, k and v in its code.

    Returns:
        what `call` returns, usually (B, L, H, D).

    The linear layer behind it forms the gradient of the output first; the attention is then run again with its
    backward, and the layer gets the output for its own weight from there.
    """
    q, k, v = _trimmed(q, k, v)
    options: dict[str, Any] = {"parameters": parameters, "joint": True, "random": random, "codec": codec}
    if mask is None:
        return recompute(lambda q, k, v: call(q, k, v, None), q, k, v, **options)
    return recompute(call, q, k, v, mask, **options)


def dropout_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    p: float,
    *,
    scale: float | None = None,
    causal: bool = False,
    bias: Tensor | None = None,
    codec: Codec | None = None,
) -> Tensor:
    """Attention with dropout as torch's math path on a CPU computes it, bit for bit from the same random state.

    Keeps q, k, v and a bit per probability; torch keeps the probabilities, their noise and their product with it, 12
    bytes each. Works on a few batch elements at a time.

    Args:
        q: (B, H, L, D); k, v: (B, H, S, D).
        mask: boolean (True: attend) or additive, broadcastable to (B, H, L, S); None for none.
        p: dropout probability, below 1.
        scale: default 1 / sqrt(D).
        causal: attend only to positions up to one's own.
        bias: (1 or B, H, L, S), added to the scores; may take a gradient. All layers may share it: it is kept as it is.
        codec: keeps q, k and v in its code.

    Returns:
        (B, L, H, D), contiguous.

    Raises:
        RuntimeError: on double backward.
    """
    lowest, kind = torch.finfo(k.dtype).min, autocast_dtype(q.device.type)
    q, k, v = _trimmed(*cast_for_autocast(q, k, v))
    if causal:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    if bias is None and mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
    factor = math.sqrt(1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    joint = _DropoutJoint(p, factor, Kept(codec, q, k, v), mask, bias, lowest, kind)
    with torch.autocast(q.device.type, enabled=False):  # which torch's attention is under inside
        out, bits, *packed = _DropoutAttention.apply(joint, q, k, v, mask, bias)
        added = [t for t in (mask, bias) if t is not None]
        return attach(out, (bits, *added, *(packed or (q, k, v))), joint)


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
    """Forward again and backward, some batch elements at a time.

    Args:
        lowest: what a model adds where nobody may look.
        kind: what autocast casts the sum of mask and bias to, or None.
    """

    def __init__(
        self,
        p: float,
        factor: float,
        coded: Kept,
        mask: Tensor | None,
        bias: Tensor | None,
        lowest: float,
        kind: torch.dtype | None,
    ):
        super().__init__(self.again)
        self.p, self.factor, self.coded = p, factor, coded
        self.lowest, self.kind = lowest, kind
        self.masked, self.biased = mask is not None, bias is not None
        self.learns = bias is not None and bias.requires_grad

    def inputs_of(self, kept: Sequence[Tensor]) -> tuple[Tensor, list[Tensor], tuple[Tensor | None, Tensor | None]]:
        """(bits of the noise, [q, k, v], (attention mask, bias)); the last two stand between the others"""
        bits, *rest = kept
        mask = rest.pop(0) if self.masked else None
        bias = rest.pop(0) if self.biased else None
        return bits, self.coded.again(rest), (mask, bias)

    def probabilities(self, q: Tensor, k: Tensor, added: tuple[Tensor | None, Tensor | None], part: slice) -> Tensor:
        """(b, H, L, S) of a part of the batch, in the order of operations of torch's math path."""
        scores = (_wide(q[part]) * self.factor) @ (_wide(k[part]).transpose(-2, -1) * self.factor)
        mask, bias = (_of(t, part) for t in added)
        if bias is not None and mask is not None:
            # as transformers does it: a row that may look at nothing is not all -inf, so it looks at everything alike
            mask = torch.where(mask, bias, self.lowest) if mask.dtype == torch.bool else bias + mask
        elif bias is not None:
            mask = bias
        if mask is None:
            return torch.softmax(scores, -1)
        if self.kind is not None:
            mask = mask.to(self.kind)
        # a row that may look at nothing gets zeros
        return torch._safe_softmax(scores.add_(mask), -1)

    def noise(self, packed: Tensor, like: Tensor, number: int, last: bool) -> Tensor:
        """What the probabilities of part `number` are multiplied with."""
        scale = torch.ones((), dtype=like.dtype).div_(1 - self.p)
        count = -(-like.numel() // 8)
        # only the last part may be smaller than the others, and it ends with the bits
        start = packed.numel() - count if last else number * count
        return unpack(packed[start : start + count], like.numel(), scale).view(like.shape)

    def again(self, *kept) -> Tensor:
        packed, (q, k, v), added = self.inputs_of(kept)
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1])
        parts = _parts(q, k)
        for number, part in enumerate(parts):
            found = self.probabilities(q, k, added, part)
            noise = self.noise(packed, found, number, part is parts[-1])
            out[part] = (found.mul_(noise) @ _wide(v[part])).transpose(1, 2)
        return out

    def backward(self, kept, parameters, grad):
        packed, (q, k, v), added = self.inputs_of(kept)
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1])
        grad = grad.view(out.shape)
        grads = [torch.empty_like(t) for t in (q, k, v)]
        mask, bias = added
        of_bias = torch.zeros_like(bias) if bias is not None and self.learns else None
        parts = _parts(q, k)
        for number, part in enumerate(parts):
            found = self.probabilities(q, k, added, part)
            noise = self.noise(packed, found, number, part is parts[-1])
            dropped, pull = found * noise, _wide(grad[part]).transpose(1, 2)
            out[part] = (dropped @ _wide(v[part])).transpose(1, 2)
            grads[2][part] = dropped.transpose(-2, -1) @ pull
            slope = (pull @ _wide(v[part]).transpose(-2, -1)).mul_(noise)
            slope = torch._softmax_backward_data(slope, found, -1, found.dtype)
            if of_bias is not None:
                allowed = _of(mask, part) if mask is not None and mask.dtype == torch.bool else None
                reached = slope if allowed is None else slope.where(allowed, 0.0)
                _of(of_bias, part).add_(reached if of_bias.shape[0] > 1 else reached.sum(0, keepdim=True))
            grads[0][part] = (slope @ (_wide(k[part]) * self.factor)).mul_(self.factor)
            grads[1][part] = (slope.transpose(-2, -1) @ (_wide(q[part]) * self.factor)).mul_(self.factor)
        return out, [*grads, None, of_bias]


def _of(t: Any, part: slice) -> Any:
    """A mask's or a bias's share of a part of the batch."""
    return t[part] if t is not None and t.dim() == 4 and t.shape[0] > 1 else t


def _parts(q: Tensor, k: Tensor) -> list[slice]:
    """Parts of the batch whose probabilities are computed at once: as many elements as keep them in the cache."""
    rows, heads, length, _ = q.shape
    size = max(1, PART_BYTES // max(1, 4 * heads * length * k.shape[-2]))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


class _DropoutAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, joint, q, k, v, mask, bias):
        ctx.joint = joint
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1])
        packed = []
        for part in _parts(q, k):
            found = joint.probabilities(q, k, (mask, bias), part)
            noise = torch.empty_like(found).bernoulli_(1 - joint.p)
            packed.append(pack(noise.bool()))
            out[part] = (found.mul_(noise.div_(1 - joint.p)) @ _wide(v[part])).transpose(1, 2)
        bits, coded = torch.cat(packed), joint.coded.encode(q, k, v)
        added = [t for t in (mask, bias) if t is not None]
        save_beside(ctx, [bits, *coded], bits, *added, *(coded or (q, k, v)))
        return out, bits, *coded

    @staticmethod
    @first_gradient
    def backward(ctx, grad):
        refuse_second_derivative("dropout_attention")
        grads = ctx.joint.taken(grad)
        if grads is None:
            grads = ctx.joint.backward(ctx.saved_tensors, (), grad.contiguous())[1]
        return None, *grads
