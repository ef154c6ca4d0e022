"""Sources: what a tensor can be rebuilt from in backward, so that its users need not keep it.

Most tensors that a step keeps have several users: the output of a norm is kept by each linear layer behind it, and
the norm keeps its input as well. An operator here hangs a `Source` on its output that says which of the tensors *it*
keeps rebuild it. A linear layer that finds a source on its input keeps those (the same storages, so nothing is
added) instead of the input. Who keeps what is thus decided tensor by tensor as the model runs, whatever the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from tightfit.ops.autograd import autocast_dtype

_ATTRIBUTE = "_tightfit_source"


class Rebuild:
    """Makes one tensor again from what was kept of it; holds no tensor itself but while it is shared.

    Several users of the tensor share a rebuilt value, from the first one's backward to the last one's.

    Args:
        rowwise: a row of the value comes from the same row of everything that is kept, so `rows` can make some alone.
    """

    joint = False

    def __init__(self, make: Callable[..., Tensor], rowwise: bool = False):
        self._make, self.rowwise = make, rowwise
        self._autocast: torch.dtype | None = None
        self._users = 0
        self._value: Tensor | None = None

    def remember_autocast(self, device_type: str) -> None:
        """The value is made again as it was made now, though backward runs without autocast."""
        self._autocast = autocast_dtype(device_type)

    def add_user(self) -> None:
        self._users += 1

    def __call__(self, kept: Sequence[Tensor], grad: Tensor | None = None) -> Tensor:
        """The value. `grad` is the gradient that the caller sends to it, for operators that can use it here."""
        self._users -= 1
        return self._shared(kept, grad)

    def ahead(self, kept: Sequence[Tensor]) -> Tensor:
        """The value for somebody else, before its users ask; held for them."""
        return self._shared(kept, None)

    def _shared(self, kept: Sequence[Tensor], grad: Tensor | None) -> Tensor:
        value = self._value if self._value is not None else self.make(kept, grad)
        self._value = value if self._users > 0 else None
        return value

    def make(self, kept: Sequence[Tensor], grad: Tensor | None) -> Tensor:
        with torch.no_grad(), self.as_in_forward(kept[0].device.type):
            return self._make(*kept)

    def rows(self, kept: Sequence[Tensor], index: Tensor) -> Tensor:
        """Some rows of the value, (k, width), where it is `rowwise`; not shared, and by no user that was added."""
        return self.make([t.reshape(-1, t.shape[-1]).index_select(0, index) for t in kept], None)

    def as_in_forward(self, device_type: str) -> AbstractContextManager:
        """Autocast as it was when the value was made."""
        return torch.autocast(device_type, dtype=self._autocast, enabled=self._autocast is not None)


class Source(NamedTuple):
    """The tensors to keep instead of another one, and how they make it again."""

    kept: tuple[Tensor, ...]
    rebuild: Rebuild


def attach(
    tensor: Tensor, kept: Sequence[Tensor], rebuild: Rebuild | Callable[..., Tensor], *, rowwise: bool = False
) -> Tensor:
    """Hang a source on an operator's output; `kept` must be what the operator keeps anyway."""
    rebuild = rebuild if isinstance(rebuild, Rebuild) else Rebuild(rebuild, rowwise)
    rebuild.remember_autocast(tensor.device.type)
    source = Source(tuple(t.detach() for t in kept), rebuild)
    setattr(tensor, _ATTRIBUTE, (source, tensor._version))
    return tensor


def lasting(parameter: Tensor | None) -> Tensor | None:
    """The parameter as a source may hold it: a copy where a process group is up, for small parameters only.

    FSDP frees a block's parameters behind its forward and has them back in its own backward only; a block's last norm
    is rebuilt earlier, in the backward of the block behind it.
    """
    if parameter is None or not (dist.is_available() and dist.is_initialized()):
        return parameter
    return parameter.detach().clone()


def source_of(tensor: Tensor) -> Source | None:
    """The source of a tensor, or of the contiguous tensor it is a reshaped view of; None if it was written to since."""
    for owner in (tensor, tensor._base):
        found = getattr(owner, _ATTRIBUTE, None)
        if owner is None or found is None:
            continue
        source, version = found
        if tensor._version == version and (owner is tensor or _same_order(owner, tensor)):
            return source
    return None


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in another type, whose users keep what rebuilds x, or x itself, instead of the copy."""
    copy = x.to(dtype)
    if copy is x or not torch.is_grad_enabled():
        return copy
    source = source_of(x)
    if source is None:
        return attach(copy, (x,), lambda kept: kept.to(dtype), rowwise=True)
    make, rowwise = source.rebuild.make, source.rebuild.rowwise
    return attach(copy, source.kept, lambda *kept: make(kept, None).to(dtype), rowwise=rowwise)


def detach_source(tensor: Tensor) -> None:
    """Take the source off a tensor, so that its users keep the tensor itself."""
    for owner in (tensor, tensor._base):
        if owner is not None and hasattr(owner, _ATTRIBUTE):
            delattr(owner, _ATTRIBUTE)


def _same_order(base: Tensor, view: Tensor) -> bool:
    return base.is_contiguous() and view.is_contiguous() and base.numel() == view.numel()
