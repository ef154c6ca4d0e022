"""Affine codes: per group of g channels of one token, x ~ lo + D q with integers q of 8 or 4 bits.

A group's range stands behind its codes in the same row of bytes, as float32 (float16 for 4 bits): the layout of
torch's own row-wise quantised embedding tables, whose one-pass kernels do the work on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tightfit.ops import kernels
from tightfit.ops.codec import Codec, rows_of
from tightfit.ops.probing import probe

RANGE = {8: torch.float32, 4: torch.float16}
PARTS = 4
LEAST_PART = 2**18
"""Elements of the parts that a tensor is decoded in: a quarter of it, but not so few that calls cost more."""


class Affine(Codec):
    """Asymmetric integers with a range per group of channels of one token.

    Args:
        bits: 8 or 4.
        group_size: channels that share a range, nearly; rows are cut into equal groups (see `group_of`).
        rounding: "nearest" (error at most D / 2) or "stochastic" (unbiased, error below D).

    A group with a NaN or an infinity comes back as NaN. With 4 bits a group does as well whose minimum or step float16
    cannot hold, with 8 bits one whose sum float32 cannot hold. Beside the rounding of the codes there is that of the
    range: up to 2^-11 of the minimum with 4 bits. Differences below about 1e-8 are lost (5e-7 with 4 bits).

    Raises:
        TypeError: a tensor to encode is not floating point.

    Example:
        >>> codec, x = Affine(bits=8, group_size=4), torch.tensor([[0.0, 1.0, 2.0, 255.0]])
        >>> codec.decode(codec.encode(x), x.shape, x.dtype)
        tensor([[  0.,   1.,   2., 255.]])

    Source: arXiv 2111.11124, section 3, with the token groups of arXiv 2110.02861 in place of heads over a batch.
    Deviation: ranges in float32 (float16 for 4 bits) instead of bfloat16, nearest rounding unless asked otherwise.
    """

    def __init__(self, bits: int = 8, group_size: int = 128, rounding: str = "nearest"):
        self.bits, self.group_size, self.rounding = bits, group_size, rounding

    def encode(self, x: Tensor) -> tuple[Tensor]:
        if not x.is_floating_point():
            raise TypeError(f"Affine: the tensor to encode is {x.dtype}, accepted is floating point; cast it before")
        group, width = self.group_of(x.shape[-1])
        if kernels.use(x):
            from tightfit.ops.affine import triton

            return (triton.pack(x, group, width, self.bits, self.rounding == "stochastic"),)
        missing = width - x.shape[-1]
        if missing:  # the last channel once more, which leaves its group's range as it is
            x = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], missing)], dim=-1)
        groups = x.reshape(-1, group).float()
        if self.rounding == "nearest":
            return (torch.ops.tightfit.affine_pack(groups, self.bits),)
        return (_pack(groups, self.bits, torch.rand_like(groups)),)

    def decode(self, packed: Sequence[Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        group, width = self.group_of(shape[-1])
        if kernels.use(packed[0]):
            from tightfit.ops.affine import triton

            return triton.unpack(packed[0], shape, dtype, group, width, self.bits)
        x = torch.ops.tightfit.affine_unpack(packed[0], self.bits).to(dtype).view(*shape[:-1], width)
        return x if width == shape[-1] else x[..., : shape[-1]]

    def row_blocks(self, shape: Sequence[int]) -> list[slice]:
        rows = rows_of(shape)
        each = max(math.ceil(rows / PARTS), math.ceil(LEAST_PART / shape[-1]))
        return [slice(start, min(start + each, rows)) for start in range(0, rows, each)]

    def decode_rows(self, packed: Sequence[Tensor], rows: slice, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        group, width = self.group_of(shape[-1])
        groups = width // group
        part = packed[0][rows.start * groups : rows.stop * groups]
        return self.decode((part,), torch.Size((rows.stop - rows.start, shape[-1])), dtype)

    def nbytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        group, width = self.group_of(shape[-1])
        return rows_of(shape) * (width // group) * row_bytes(group, self.bits)

    def group_of(self, width: int) -> tuple[int, int]:
        """(channels per group, channels after padding).

        Equal, even groups: of `group_size`, or else of the divisor of the width that comes nearest between half and
        one and a half times that, else of `group_size` with padding.

        >>> Affine().group_of(768), Affine().group_of(1376), Affine().group_of(1009)
        ((128, 768), (172, 1376), (128, 1024))
        """
        size = self.group_size
        if width <= size:
            return width + width % 2, width + width % 2
        near = [g for g in range(2, width + 1, 2) if width % g == 0 and 2 * g >= size and 2 * g <= 3 * size]
        if near:
            return min(near, key=lambda g: abs(math.log(g / size))), width
        even = size + size % 2
        return even, even * math.ceil(width / even)

    def shares_with(self, other: Codec) -> bool:
        return isinstance(other, Affine) and vars(other) == vars(self)


def row_bytes(group: int, bits: int) -> int:
    """Bytes of one group: its codes and its range.

    >>> row_bytes(128, 8), row_bytes(128, 4)
    (136, 68)
    """
    return group * bits // 8 + 2 * RANGE[bits].itemsize


@torch.library.custom_op("tightfit::affine_pack", mutates_args=())
def affine_pack(groups: Tensor, bits: int) -> Tensor:
    """(G, g) float32 -> (G, row_bytes) uint8, rounding to nearest."""
    if kernels.use(groups):
        from tightfit.ops.affine import triton

        return triton.pack(groups, groups.shape[1], groups.shape[1], bits)
    if not groups.is_cpu:
        return _pack(groups, bits, None)
    quantized = torch.ops.quantized
    pack = quantized.embedding_bag_byte_prepack if bits == 8 else quantized.embedding_bag_4bit_prepack
    packed = pack(groups.contiguous())
    # that kernel passes over NaN; a sum does not
    total = groups @ groups.new_ones(groups.shape[-1])
    lost = (total - total).to(RANGE[bits])  # zero or NaN
    if lost.any():
        packed[:, -RANGE[bits].itemsize :] |= lost.unsqueeze(-1).view(torch.uint8)
    return packed


@affine_pack.register_fake
def _(groups, bits):
    return groups.new_empty(groups.shape[0], row_bytes(groups.shape[1], bits), dtype=torch.uint8)


@probe("affine_pack")
def _(values):
    return lambda values: affine_pack(values.reshape(-1, 128).float(), 8)


@torch.library.custom_op("tightfit::affine_unpack", mutates_args=())
def affine_unpack(packed: Tensor, bits: int) -> Tensor:
    """(G, row_bytes) uint8 -> (G, g) float32."""
    if kernels.use(packed):
        from tightfit.ops.affine import triton

        group = _group_in(packed, bits)
        return triton.unpack(packed, (packed.shape[0], group), torch.float32, group, group, bits)
    if not packed.is_cpu:
        return _unpack(packed, bits)
    quantized = torch.ops.quantized
    return quantized.embedding_bag_byte_unpack(packed) if bits == 8 else quantized.embedding_bag_4bit_unpack(packed)


@affine_unpack.register_fake
def _(packed, bits):
    return packed.new_empty(packed.shape[0], _group_in(packed, bits), dtype=torch.float32)


@probe("affine_unpack")
def _(values):
    packed = affine_pack(values.reshape(-1, 128).float(), 8)
    return lambda values: affine_unpack(packed, 8)


def _group_in(packed: Tensor, bits: int) -> int:
    """Channels of the groups that were packed."""
    return (packed.shape[1] - 2 * RANGE[bits].itemsize) * 8 // bits


def _pack(groups: Tensor, bits: int, noise: Tensor | None) -> Tensor:
    """The same layout in plain torch, for other devices and for stochastic rounding (`noise` in [0, 1))."""
    kind, levels = RANGE[bits], 2**bits - 1
    # a tensor: by a number a GPU would multiply with the reciprocal
    divisor = groups.new_full((), levels)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    if bits == 4:  # rounded outwards, so that the range still holds every element
        low = (low - low.abs() * 2**-10).to(kind).float()
    step = (high - low) / divisor
    if bits == 4:
        step = (step * (1 + 2**-9)).to(kind).float()
    scaled = (groups - low).div_(step.clamp_min(torch.finfo(torch.float32).tiny))
    codes = scaled.add_(0.5 if noise is None else noise).floor_().clamp_(0, levels).nan_to_num_(0.0).to(torch.uint8)
    if bits == 4:
        codes = codes[:, 0::2] | (codes[:, 1::2] << 4)
    return torch.cat([codes, torch.cat([step, low], dim=1).to(kind).view(torch.uint8)], dim=1)


def _unpack(packed: Tensor, bits: int) -> Tensor:
    size = RANGE[bits].itemsize
    codes, ranges = packed[:, : -2 * size], packed[:, -2 * size :].contiguous().view(RANGE[bits])
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1)
    step, low = ranges.float().split(1, dim=1)
    return codes.float().mul_(step).add_(low)
