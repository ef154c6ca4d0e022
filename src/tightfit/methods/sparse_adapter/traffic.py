"""What travels between host and device: hidden states and gradients down, rows and places up."""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tightfit.methods.sparse_adapter.bank import HostBank
from tightfit.ops.sparse_rows import Resident, Workspace


@dataclasses.dataclass
class Arriving:
    """A copy to the host that may be under way."""

    buffer: Tensor
    event: Any = None

    def wait(self) -> Tensor:
        """The copy, once it is whole."""
        if self.event is not None:
            self.event.synchronize()
            self.event = None
        return self.buffer


class Traffic:
    """Copies of one model. On a GPU they go through page-locked memory and a stream of their own."""

    def __init__(self) -> None:
        self.work = Workspace()
        self.bytes_up = self.bytes_down = 0
        self._pinned: dict[str, tuple[Tensor, Any]] = {}
        self._streams: dict[torch.device, Any] = {}
        self._turn = 0
        self._pageable = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Traffic:
        twin = memo[id(self)] = Traffic()
        return twin

    def down(self, x: Tensor, name: str) -> Arriving:
        """Start copying to the host; on the CPU this is the tensor itself."""
        x = x.detach()
        self.bytes_down += x.nbytes
        if x.device.type == "cpu":
            return Arriving(x)
        buffer = self._staging(name, tuple(x.shape), x.dtype)
        stream = self._stream(x.device)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            buffer.copy_(x, non_blocking=True)
            event = stream.record_event()
        x.record_stream(stream)
        return self._watched(name, buffer, event)

    def sample(self, states: Tensor) -> Arriving:
        """Some of the hidden states, and means that all of them have a part in, to know them again.

        Nobody waits for them now. Forwards of one beginning (a prompt) may differ in a few tokens only.
        """
        some = states.detach()[:, :8]
        run = max(1, len(some) // 16)
        whole, wide = len(some) // run, torch.promote_types(some.dtype, torch.float32)
        means = some[: whole * run].unflatten(0, (whole, run)).mean(1, dtype=wide)
        rest = some[whole * run :].sum(0, keepdim=True, dtype=wide)
        found = torch.cat([some[::run].to(wide), means, rest])
        if some.device.type == "cpu":
            home = torch.from_numpy(np.empty(tuple(found.shape), dtype=np.float64))
            return Arriving(home.copy_(found))
        home = torch.empty(found.shape, dtype=wide, pin_memory=not self._pageable)
        home.copy_(found, non_blocking=True)
        return Arriving(home, torch.cuda.current_stream(some.device).record_event())

    def wide(self, arrived: Tensor, dtype: torch.dtype, name: str) -> Tensor:
        """A host tensor in this dtype, contiguous."""
        if arrived.dtype == dtype and arrived.is_contiguous():
            return arrived
        return self.work.take(name, tuple(arrived.shape), dtype).copy_(arrived)

    def up(self, array: np.ndarray, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A small array on the device."""
        self.bytes_up += array.size * dtype.itemsize
        return torch.empty(array.shape, dtype=dtype, device=device).copy_(torch.from_numpy(array))

    def fetch(self, bank: HostBank, found: Resident, cap: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """(cap, 2, d) on the device: the resident rows at their places, zero elsewhere."""
        slot = torch.zeros((cap, 2, bank.shape.size), dtype=dtype, device=device)
        count = len(found.rows)
        if count == 0:
            return slot
        spread = bool(found.slots[-1] != count - 1)  # rows stand at places of their own
        length = int(found.slots[-1]) + 1
        self.bytes_up += length * slot[:1].nbytes
        rows, index = bank.tensor("rows"), torch.from_numpy(found.rows)
        target = slot[:length]
        if device.type == "cpu" and dtype == rows.dtype and not spread:
            torch.index_select(rows, 0, index, out=target)
            return slot
        held = torch.index_select(rows, 0, index, out=self.work.take("held", (count, *rows.shape[1:]), rows.dtype))
        if spread:
            placed = self.work.take("placed", tuple(target.shape), rows.dtype).zero_()
            held = placed.index_copy_(0, torch.from_numpy(found.slots), held)
        if device.type == "cpu":
            target.copy_(held)
            return slot
        self._turn = 1 - self._turn
        name = f"rows {self._turn}"
        staged = self._staging(name, tuple(target.shape), dtype).copy_(held)
        stream, current = self._stream(device), torch.cuda.current_stream(device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            target.copy_(staged, non_blocking=True)
            event = stream.record_event()
        self._watched(name, staged, event)
        current.wait_event(event)
        return slot

    # -- page-locked memory ------------------------------------------------------------------------------------------

    def _staging(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory of that name, not before the last copy from or to it is done."""
        size = math.prod(shape) * dtype.itemsize
        memory, event = self._pinned.get(name, (None, None))
        if event is not None:
            event.synchronize()
        if memory is None or memory.nbytes < size:
            memory = self._locked(size)
            self._pinned[name] = (memory, None)
        return memory[:size].view(dtype).view(shape)

    def _watched(self, name: str, buffer: Tensor, event: Any) -> Arriving:
        self._pinned[name] = (self._pinned[name][0], event)
        return Arriving(buffer, event)

    def _locked(self, size: int) -> Tensor:
        if not self._pageable:
            try:
                return torch.empty(size, dtype=torch.uint8, pin_memory=True)
            except RuntimeError as error:
                self._pageable = True
                warnings.warn(
                    f"SparseAdapter: {size:,} bytes could not be page-locked ({error}); copies to the device will be "
                    f"slower",
                    UserWarning,
                    stacklevel=2,
                )
        return torch.empty(size, dtype=torch.uint8)

    def _stream(self, device: torch.device) -> Any:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]
