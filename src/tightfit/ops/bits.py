"""Boolean masks at one bit per element."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# eight bytes of 0 or 1 in one integer: the product moves byte k to bit 56 + k
_GATHER = 0x0102040810204080


def pack(mask: Tensor) -> Tensor:
    """The elements of a boolean tensor in reading order, eight to a byte; the last byte is padded with zeros.

    >>> pack(torch.tensor([True, False, True])).tolist()
    [5]
    """
    flat = mask.reshape(-1)
    if flat.numel() % 8:
        flat = F.pad(flat, (0, -flat.numel() % 8))
    return ((flat.view(torch.int64) * _GATHER) >> 56).to(torch.uint8)


def unpack(packed: Tensor, count: int, ones: Tensor) -> Tensor:
    """A flat tensor of `count` elements with the value of `ones` (0-dim) where a bit is set, else 0.

    >>> unpack(torch.tensor([5], dtype=torch.uint8), 3, torch.tensor(2.0)).tolist()
    [2.0, 0.0, 2.0]
    """
    # made anew each time: a table cached under a planner's fake mode would be fake in the real step
    bits = (torch.arange(256, device=packed.device)[:, None] >> torch.arange(8, device=packed.device)) & 1
    return (bits.to(ones.dtype) * ones).index_select(0, packed.int()).view(-1)[:count]
