"""Modules that a method adds: of the right dtype, on the right device, from random numbers of their own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tightfit.core import hfmodel
from tightfit.core.edit import is_planning


def like(model: nn.Module) -> Tensor:
    """An empty tensor of the dtype of new modules (float32 beside half precision), on the first block's device."""
    block = model.get_submodule(hfmodel.stacks(model)[0][0])
    first = next(block.parameters())
    wide = first.dtype in (torch.float32, torch.float64)
    return torch.empty(0, dtype=first.dtype if wide else torch.float32, device=first.device)


@contextlib.contextmanager
def own_random(seed: int) -> Iterator[None]:
    """Random numbers of our own; the global state is left alone, and not drawn from while planning."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        yield


def fresh(model: nn.Module, seed: int, make: Callable[[], nn.Module]) -> Any:
    """What `make` builds, of the dtype and on the device of new modules; without weights while planning."""
    kind = like(model)
    meta = is_planning() or kind.is_meta
    with own_random(seed), torch.device("meta") if meta else contextlib.nullcontext():
        net = make()
    return net.to(kind.dtype) if meta else net.to(kind.device, kind.dtype)
