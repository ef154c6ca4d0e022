"""The rows of one layer on the host: keys, values, gradients and Adam's state, outside of torch's allocator."""

from __future__ import annotations

import copy
import dataclasses
import math
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tightfit.methods.sparse_adapter.errors import HostMemoryError
from tightfit.ops.sparse_rows import AdamW, Workspace, row_adamw
from tightfit.ops.sparse_rows.adamw import chunks

_NUMPY = {torch.float32: np.float32, torch.float64: np.float64, torch.bfloat16: np.int16}
_BLOCK_ROWS = 4096
SPARE = 0.05
"""Share of the free memory that is left to others."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """How large a bank is.

    Attributes:
        width: rows, r.
        size: of a key or a value, d.
        dtype: of the rows; gradients and Adam's state are float32, or float64 with float64 rows.
        groups: of equal runs of rows that have a mean key each; 0: none.
        store: "memory" or "disk".
    """

    width: int
    size: int
    dtype: torch.dtype
    groups: int
    store: str

    @property
    def wide(self) -> torch.dtype:
        """The dtype of gradients and Adam's state."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def arrays(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name -> shape and dtype of everything that grows with the width."""
        whole = (self.width, 2, self.size)
        return {
            "rows": (whole, self.dtype),
            "grad": (whole, self.wide),
            "exp_avg": (whole, self.wide),
            "exp_avg_sq": (whole, self.wide),
        }

    @property
    def nbytes(self) -> int:
        """Bytes on the host: 16 per number of the adapter in float32, 14 in bfloat16, and 5 per row."""
        large = sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.arrays().values())
        return large + self.width * 5 + self.groups * self.size * self.wide.itemsize


class HostBank:
    """The rows of one layer; a hollow one has a shape only (while planning)."""

    def __init__(self, shape: Shape, *, hollow: bool):
        self.shape, self.hollow = shape, hollow
        self.norm = 0.0
        self.pending = False
        self._arrays: dict[str, np.ndarray] = {}
        if hollow:
            return
        for name, (sizes, dtype) in shape.arrays().items():
            self._arrays[name] = _zeros(sizes, _NUMPY[dtype], shape.store)
        self.step = np.zeros(shape.width, dtype=np.int32)
        self.touched = np.zeros(shape.width, dtype=bool)
        self.router = np.zeros((shape.groups, shape.size), _NUMPY[shape.wide])

    def __deepcopy__(self, memo: dict[int, Any]) -> HostBank:
        if self.hollow or type(copy.deepcopy(torch.empty(0))).__name__ == "FakeTensor":
            twin = memo[id(self)] = HostBank(self.shape, hollow=True)
            return twin
        twin = memo[id(self)] = HostBank(self.shape, hollow=False)
        for name, array in self._arrays.items():
            twin._arrays[name][:] = array
        twin.step[:], twin.touched[:], twin.router[:] = self.step, self.touched, self.router
        twin.norm, twin.pending = self.norm, self.pending
        return twin

    def tensor(self, name: str) -> Tensor:
        """(r, 2, d) "rows", "grad", "exp_avg" or "exp_avg_sq"; shares the bank's memory."""
        found = torch.from_numpy(self._arrays[name])
        dtype = self.shape.arrays()[name][1]
        return found if found.dtype == dtype else found.view(dtype)

    @property
    def keys(self) -> Tensor:
        """(r, d)."""
        return self.tensor("rows")[:, 0]

    @property
    def values(self) -> Tensor:
        """(r, d)."""
        return self.tensor("rows")[:, 1]

    def close(self) -> None:
        """Let go of the memory."""
        self._arrays = {}
        self.hollow, self.pending = True, False

    # -- first values -----------------------------------------------------------------------------------------------

    def draw(self, spread: float, seed: tuple[int, int], like: Tensor | None = None) -> None:
        """Keys of normal numbers, or copies of the rows of `like` (n, d) with such noise from the second copy on."""
        generator = np.random.default_rng(seed)
        width, size = self.shape.width, self.shape.size
        for start in range(0, width, _BLOCK_ROWS):
            stop = min(width, start + _BLOCK_ROWS)
            drawn = torch.from_numpy(generator.standard_normal((stop - start, size), dtype=np.float32)).mul_(spread)
            if like is not None:
                index = torch.arange(start, stop)
                drawn[index < len(like)] = 0.0
                drawn += like[index % len(like)].detach().to("cpu", torch.float32)
            self.keys[start:stop] = drawn
        self.refresh()

    def refresh(self) -> None:
        """Make the mean keys of all groups again."""
        length = self.shape.width // max(1, self.shape.groups)
        for group in range(self.shape.groups):
            own = self.keys[group * length : (group + 1) * length]
            self.router[group] = own.to(self.shape.wide).mean(0).numpy()

    # -- gradients --------------------------------------------------------------------------------------------------

    def add_grad(self, rows: np.ndarray, grad: Tensor) -> None:
        """Add (n, 2, d) gradients of distinct rows."""
        if len(rows) == 0:
            return
        self._arrays["grad"][rows] += grad.numpy()
        self.touched[rows] = True
        self.pending = True

    def drop_grad(self) -> None:
        """Forget all gradients."""
        rows = np.flatnonzero(self.touched)
        self._arrays["grad"][rows] = 0
        self.touched[rows] = False
        self.pending, self.norm = False, 0.0

    def measure_norm(self, work: Workspace) -> float:
        """The norm of all gradients."""
        total, grad = 0.0, self._flat("grad")
        for index in chunks(np.flatnonzero(self.touched), grad.shape[1] * grad.element_size()):
            part = torch.index_select(
                grad, 0, index, out=work.take("gradient", (len(index), grad.shape[1]), grad.dtype)
            )
            total += float(torch.linalg.vector_norm(part)) ** 2
        self.norm = math.sqrt(total)
        return self.norm

    def update(self, lr: float, factor: float, settings: AdamW, work: Workspace) -> None:
        """One AdamW step of the rows that have gradients, which it clears."""
        rows = np.flatnonzero(self.touched)
        values, grad, mean, square = map(self._flat, ("rows", "grad", "exp_avg", "exp_avg_sq"))
        moved = self._move_means if self.shape.groups else None
        row_adamw(values, grad, mean, square, self.step, rows, lr, settings, work, factor, moved)
        self.touched[rows] = False
        self.pending, self.norm = False, 0.0

    def _move_means(self, rows: Tensor, change: Tensor) -> None:
        """The mean keys after some rows have changed by (t, 2 d)."""
        length = self.shape.width // self.shape.groups
        keys = change[:, : self.shape.size]
        torch.from_numpy(self.router).index_add_(0, rows // length, keys, alpha=1 / length)

    def _flat(self, name: str) -> Tensor:
        return self.tensor(name).view(self.shape.width, 2 * self.shape.size)

    # -- saving -----------------------------------------------------------------------------------------------------

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """The rows, and Adam's state once there is one."""
        yield "rows", self.tensor("rows")
        if self.step.any():
            yield "exp_avg", self.tensor("exp_avg")
            yield "exp_avg_sq", self.tensor("exp_avg_sq")
            yield "step", torch.from_numpy(self.step)
            if self.shape.groups:  # moved with the keys, so its last bits are not those of a fresh mean
                yield "router", torch.from_numpy(self.router)

    def load(self, found: dict[str, Tensor]) -> None:
        """Take what `state` gave; state that is not there is zero."""
        for name in ("rows", "exp_avg", "exp_avg_sq"):
            if name in found:
                self.tensor(name).copy_(found[name])
            elif name != "rows" and self.step.any():
                self.tensor(name).zero_()
        self.step[:] = found["step"].cpu().numpy() if "step" in found else 0
        self.drop_grad()
        if "router" in found and self.shape.groups:
            self.router[:] = found["router"].cpu().numpy()
        else:
            self.refresh()


def check_room(needed: int, shape: Shape, count: int) -> None:
    """Raise HostMemoryError where `count` banks of this shape do not fit."""
    free = free_bytes(shape.store)
    if free is None or needed <= free * (1 - SPARE):
        return
    per_row = shape.nbytes / shape.width
    fits = int(free * (1 - SPARE) / count / per_row)
    place = "the disk of the temporary folder" if shape.store == "disk" else "the host's memory"
    raise HostMemoryError(
        f"SparseAdapter(width={shape.width}): {count} layers of {shape.size} need {needed:,} bytes with gradients and "
        f"optimizer state, and {place} has {free:,} free; give at most width={max(fits, 0)}, "
        + ("another TMPDIR" if shape.store == "disk" else "fewer layers by where=, or store='disk'")
    )


def free_bytes(store: str) -> int | None:
    """Bytes that the host can still give; None where nothing tells."""
    if store == "disk":
        return shutil.disk_usage(tempfile.gettempdir()).free
    found = [value for value in (_available(), _left_of_control_group()) if value is not None]
    return min(found) if found else None


def _available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None


def _left_of_control_group() -> int | None:
    """What the container may still take, where it has a limit."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text(encoding="ascii").strip()
        used = int((folder / "memory.current").read_text(encoding="ascii"))
        return None if limit == "max" else max(0, int(limit) - used)
    except (OSError, ValueError):
        return None


def _zeros(shape: tuple[int, ...], dtype: Any, store: str) -> np.ndarray:
    """Zeros; pages are taken when they are written to. On disk: a file that vanishes with the array."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if store == "memory" or size == 0:
        return np.zeros(shape, dtype)
    handle, path = tempfile.mkstemp(prefix="tightfit-rows-")
    try:
        # reserve the blocks now: writing to a hole on a full disk kills the process
        os.posix_fallocate(handle, 0, size)
        home = mmap.mmap(handle, size)
    finally:
        os.close(handle)
        os.unlink(path)
    return np.frombuffer(home, dtype=dtype).reshape(shape)
