"""Which of several processes this is, as torch.distributed tells it."""

from __future__ import annotations

import os

import torch.distributed as dist
from torch import nn


def count() -> int:
    """Processes of the run; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def launched() -> int:
    """Processes that the launcher said it starts, before there is a group; 1 where nothing was said."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def wait() -> None:
    """Until every process has come here."""
    if count() > 1:
        dist.barrier()


def class_name(module: nn.Module) -> str:
    """Name of the module's class; `fully_shard` puts its own on top of it."""
    return type(module).__bases__[-1].__name__ if is_fsdp(module) else type(module).__name__


def is_fsdp(module: nn.Module) -> bool:
    """Whether `fully_shard` was called on this very module."""
    return any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__)
