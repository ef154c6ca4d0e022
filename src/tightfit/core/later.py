"""Tensors of a stock checkpoint that are made when they are written, so that no second model stands in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch


class Later(torch.Tensor):
    """A tensor in shape, dtype and device; `contiguous`, or any operator, makes its values, each time anew.

    Who writes a checkpoint asks for memory that is shared and for sizes first, and for values shard by shard.
    """

    _make: Callable[[], torch.Tensor]
    _marker: torch.Tensor

    @staticmethod
    def __new__(cls, like: torch.Tensor, make: Callable[[], torch.Tensor]):
        self = torch.Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=like.device)
        self._make, self._marker = make, torch.zeros(1, dtype=torch.uint8)
        return self

    def __init__(self, like: torch.Tensor, make: Callable[[], torch.Tensor]):
        pass

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Later(shape={tuple(self.shape)}, dtype={self.dtype})"

    def contiguous(self, *args: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        """The values."""
        return self._make().detach().contiguous(*args, **kwargs)

    def untyped_storage(self) -> Any:
        """Who it is, and the bytes it will take."""
        return _Room(self._marker.data_ptr(), self.numel() * self.itemsize)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        return func(*map(_made, args), **{key: _made(value) for key, value in (kwargs or {}).items()})


class _Room:
    def __init__(self, pointer: int, count: int):
        self.pointer, self.count = pointer, count

    def data_ptr(self) -> int:
        return self.pointer

    def nbytes(self) -> int:
        return self.count


def _made(value: Any) -> Any:
    if isinstance(value, Later):
        return value.contiguous()
    return type(value)(map(_made, value)) if isinstance(value, list | tuple) else value


def made(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors with all values."""
    return {name: _made(tensor) for name, tensor in tensors.items()}
