"""Host-side stores: tensors kept out of the allocator's memory, in a mapped temporary file."""

from __future__ import annotations

import math
import os
import tempfile

import torch

_PREFIX = "tightfit-host-"


_BLOCK_BYTES = 2**25


def to_host(tensor: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
    """A read-mostly copy of `tensor`, or of its given rows, on the host, in a mapped temporary file.

    The file vanishes with the copy. Rows are copied in blocks, so that they never stand beside the tensor as a whole.
    Its pages are the page cache's, so the system can drop them under pressure; the allocator does not count them.
    Where no file can be mapped the copy is an ordinary CPU tensor. Meta and fake tensors stay as they are.
    """
    source = tensor.detach()
    if source.is_meta or type(source).__name__ == "FakeTensor":
        return source if rows is None else source.index_select(0, rows.to(source.device))
    shape = source.shape if rows is None else (len(rows), *source.shape[1:])
    try:
        home = map_file(shape, source.dtype)
    except (OSError, RuntimeError, AttributeError):  # no space, no mapping, no posix_fallocate
        home = torch.empty(shape, dtype=source.dtype)
    if rows is None:
        return home.copy_(source)
    block = max(1, _BLOCK_BYTES // max(1, source[:1].nbytes))
    for start in range(0, len(rows), block):
        part = rows[start : start + block]
        home[start : start + block] = source.index_select(0, part.to(source.device))
    return home


def map_file(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor in a mapped temporary file, which vanishes with it; its values are zeros.

    Raises:
        OSError, RuntimeError, AttributeError: no space, or no mapping on this system.
    """
    size = math.prod(shape)
    if size == 0:
        return torch.empty(shape, dtype=dtype)
    handle, path = tempfile.mkstemp(prefix=_PREFIX)
    try:
        # reserve the blocks now: writing to a sparse mapping on a full disk kills the process
        os.posix_fallocate(handle, 0, size * dtype.itemsize)
        home = torch.from_file(path, shared=True, size=size, dtype=dtype).view(shape)
    finally:
        os.close(handle)
        os.unlink(path)
    return home


def is_mapped(tensor: torch.Tensor) -> bool:
    """Whether the tensor's memory is a mapped file of `to_host`."""
    filename = tensor.untyped_storage().filename if tensor.device.type == "cpu" else None
    return filename is not None and os.path.basename(filename).startswith(_PREFIX)
