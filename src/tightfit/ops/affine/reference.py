"""Affine codes group by group, in plain loops."""

from __future__ import annotations

import torch
from torch import Tensor


def round_trip(x: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """(x as it comes back after nearest rounding, the step D of each element's group) for x of (..., I).

    A group is `group` consecutive channels of one row (the last of a row may be shorter); its range is its own
    minimum and maximum, D = (max - min) / (2^bits - 1).
    """
    flat = x.double().reshape(-1, x.shape[-1])
    out, steps = torch.empty_like(flat), torch.empty_like(flat)
    for row in range(flat.shape[0]):
        for start in range(0, flat.shape[1], group):
            part = flat[row, start : start + group]
            low, step = part.min(), (part.max() - part.min()) / (2**bits - 1)
            codes = torch.zeros_like(part) if step == 0 else torch.round((part - low) / step)
            out[row, start : start + group] = low + codes * step
            steps[row, start : start + group] = step
    return out.view_as(x), steps.view_as(x)
