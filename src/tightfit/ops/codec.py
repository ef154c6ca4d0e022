"""Codecs: what is kept of a tensor instead of the tensor, where backward can do with an estimate of it.

An operator encodes in forward and decodes in backward; its output is never touched. A codec that cannot give the
tensor back (`rebuilds` is False) still gives the one thing a linear layer wants it for, its weight gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tightfit.ops.autograd import save_beside

_ATTRIBUTE = "_tightfit_packed"


class Codec:
    """Base of all codecs.

    Attributes:
        rebuilds: `decode` gives the whole tensor.
        parts: how many tensors `encode` makes.
        inner: a codec for what this one keeps, or None (sample, then quantise).
        least: narrower rows are kept as they are (an adapter's inner dimension, say).
    """

    rebuilds = True
    parts = 1
    least = 64
    inner: Codec | None = None

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """What is kept of x (..., I): new tensors, none of them aliasing x."""
        raise NotImplementedError

    def decode(self, packed: Sequence[Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """x again, approximately."""
        raise NotImplementedError

    def row_blocks(self, shape: Sequence[int]) -> list[slice]:
        """The rows (n, I) that are best decoded at once, part by part, by who need not have all of them together."""
        return [slice(0, rows_of(shape))]

    def decode_rows(self, packed: Sequence[Tensor], rows: slice, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """One of these parts, (rows, I)."""
        return self.decode(packed, shape, dtype).reshape(-1, shape[-1])

    def nbytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Bytes of `encode`'s tensors for a tensor of this shape and dtype."""
        raise NotImplementedError

    def weight_grad(self, packed: Sequence[Tensor], grad: Tensor, like: Like, transposed: bool) -> Tensor:
        """grad^T x, (O, I), from what was kept of x and the output's gradient (n, O); (I, O) if `transposed`."""
        return outer(grad, self.decode(packed, like.shape, like.dtype).reshape(-1, like.shape[-1]), transposed)

    def weight_grad_of(self, grad: Tensor, x: Tensor, transposed: bool) -> Tensor:
        """The same where x (n, I) itself is at hand in backward, because others keep what rebuilds it."""
        return outer(*self.sampled(grad, x), transposed)

    def note(self, x: Tensor) -> Tensor | None:
        """What `weight_grad_of_rows` wants to know of x (n, I) later; None: it needs all of x."""
        return None

    def weight_grad_of_rows(
        self, grad: Tensor, noted: Tensor, rows: Callable[[Tensor], Tensor], transposed: bool
    ) -> Tensor:
        """The same where x can be had row by row: `rows` gives those of an index (k,)."""
        raise NotImplementedError

    def sampled(self, grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of both whose products `weight_grad_of` sums, weighted; by default all of them."""
        return grad, x

    def shares_with(self, other: Codec) -> bool:
        """Whether what the other codec kept of a tensor serves this one as well."""
        return other is self


class Like(NamedTuple):
    """Shape and dtype of an encoded tensor."""

    shape: torch.Size
    dtype: torch.dtype


class Kept:
    """How an operator keeps its inputs: as they are, or each in a codec's code."""

    def __init__(self, codec: Codec | None, *inputs: Tensor):
        self.codec = codec if all(t.numel() for t in inputs) else None
        self.likes = [(t.shape, t.dtype, _heads_inside(t)) for t in inputs]

    def encode(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """New tensors, as many for each input; none where the inputs are kept themselves."""
        if self.codec is None:
            return ()
        flat = (t.transpose(1, 2).flatten(2) if like[2] else t for t, like in zip(inputs, self.likes))
        return tuple(part for t in flat for part in self.codec.encode(t))

    def save(self, ctx, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Save the inputs for backward; returns the codes, which the operator must return to have them kept once."""
        packed = self.encode(*inputs)
        save_beside(ctx, packed, *(packed or inputs))
        return packed

    def again(self, saved: Sequence[Tensor]) -> list[Tensor]:
        """The inputs, from what was saved of them."""
        return [self.one(saved, number) for number in range(len(self.likes))]

    def one(self, saved: Sequence[Tensor], number: int) -> Tensor:
        """One of them; new memory where there is a codec."""
        if self.codec is None:
            return saved[number]
        return self._decode(self._code(saved, number), *self.likes[number])

    @property
    def alike(self) -> bool:
        """All inputs are in code, and of one shape and type."""
        return self.codec is not None and len(set(self.likes)) == 1

    def empty(self, saved: Sequence[Tensor]) -> Tensor:
        """Memory like that of the first input."""
        shape, dtype, _ = self.likes[0]
        return saved[0].new_empty(shape, dtype=dtype)

    def each_part(self, saved: Sequence[Tensor], call: Callable[..., object], *along: Tensor) -> None:
        """Call with some rows of each input, which are `alike`, and the same rows of tensors of their shape.

        The inputs' rows (n, I) are new memory; those of a contiguous tensor are its own.
        """
        assert self.codec is not None
        shape, dtype, heads_inside = self.likes[0]
        flat = [t.reshape(-1, shape[-1]) for t in along]
        if heads_inside:
            call(*(value.reshape(-1, shape[-1]) for value in self.again(saved)), *flat)
            return
        codes = [self._code(saved, number) for number in range(len(self.likes))]
        for rows in self.codec.row_blocks(shape):
            call(*(self.codec.decode_rows(code, rows, shape, dtype) for code in codes), *(t[rows] for t in flat))

    def _code(self, saved: Sequence[Tensor], number: int) -> Sequence[Tensor]:
        each = len(saved) // len(self.likes)
        return saved[number * each :][:each]

    def _decode(self, packed: Sequence[Tensor], shape: torch.Size, dtype: torch.dtype, heads_inside: bool) -> Tensor:
        assert self.codec is not None
        if not heads_inside:
            return self.codec.decode(packed, shape, dtype)
        rows, heads, length, width = shape
        flat = self.codec.decode(packed, torch.Size((rows, length, heads * width)), dtype)
        return flat.view(rows, length, heads, width).transpose(1, 2)


def _heads_inside(t: Tensor) -> bool:
    """Whether (B, H, L, D) lies in memory as (B, L, H, D), so that a token's heads are one run of channels."""
    return t.dim() == 4 and not t.is_contiguous() and t.transpose(1, 2).is_contiguous()


class Packed(NamedTuple):
    """What one layer kept of a tensor, for its siblings that read the same tensor."""

    codec: Codec
    tensors: tuple[Tensor, ...]
    version: int


def pack_once(x: Tensor, cast: Tensor, codec: Codec) -> Packed:
    """What is kept of `cast` (x as the layer uses it); siblings of the layer that read the same x share it."""
    found: Packed | None = getattr(x, _ATTRIBUTE, None)
    if found is not None and found.version == x._version and codec.shares_with(found.codec):
        return found
    packed = Packed(codec, codec.encode(cast.detach()), x._version)
    if codec.shares_with(codec):  # else it would stay with x for nobody
        setattr(x, _ATTRIBUTE, packed)
    return packed


def forget_packed(x: Tensor) -> None:
    """Let go of what layers kept of x for their siblings."""
    if hasattr(x, _ATTRIBUTE):
        delattr(x, _ATTRIBUTE)


def outer(grad: Tensor, x: Tensor, transposed: bool) -> Tensor:
    """grad^T x for grad (n, O) and x (n, I); (I, O) if transposed."""
    return x.t() @ grad if transposed else grad.t() @ x


def rows_of(shape: Sequence[int]) -> int:
    """How many vectors a tensor of this shape holds along its last dimension."""
    return math.prod(shape[:-1])
