"""Host-side stores: tensors kept out of the allocator's memory, in a mapped temporary file."""

from __future__ import annotations

import os
import tempfile

import torch

_PREFIX = "tightfit-host-"


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A read-mostly copy of `tensor` on the host, in a mapped temporary file that vanishes with it.

    Its pages are the page cache's, so the system can drop them under pressure; the allocator does not count them.
    Where no file can be mapped the copy is an ordinary CPU tensor. Meta and fake tensors stay as they are.
    """
    source = tensor.detach()
    if source.is_meta or type(source).__name__ == "FakeTensor":
        return source
    if source.numel() == 0:
        return source.cpu().clone()
    try:
        home = _map_file(source)
    except (OSError, RuntimeError, AttributeError):  # no space, no mapping, no posix_fallocate
        return source.cpu().clone()
    home.copy_(source)
    return home


def _map_file(like: torch.Tensor) -> torch.Tensor:
    handle, path = tempfile.mkstemp(prefix=_PREFIX)
    try:
        # reserve the blocks now: writing to a sparse mapping on a full disk kills the process
        os.posix_fallocate(handle, 0, like.numel() * like.element_size())
        home = torch.from_file(path, shared=True, size=like.numel(), dtype=like.dtype).view(like.shape)
    finally:
        os.close(handle)
        os.unlink(path)
    return home


def is_mapped(tensor: torch.Tensor) -> bool:
    """Whether the tensor's memory is a mapped file of `to_host`."""
    filename = tensor.untyped_storage().filename if tensor.device.type == "cpu" else None
    return filename is not None and os.path.basename(filename).startswith(_PREFIX)
