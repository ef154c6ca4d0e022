"""The adapter beside one MLP: which rows its tokens use, and the sum of those rows' values."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import time
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tightfit.core import hfmodel, processes
from tightfit.core.errors import ArtifactError, StateError
from tightfit.core.tight import state_of
from tightfit.methods.sparse_adapter.bank import HostBank, Shape
from tightfit.methods.sparse_adapter.errors import NotFiniteError
from tightfit.methods.sparse_adapter.ledger import Ledger, distributed_call, in_backward, known_to_optimizers
from tightfit.methods.sparse_adapter.traffic import Arriving
from tightfit.ops.autograd import autocast_dtype
from tightfit.ops.rows import attention_masks, masked_rows
from tightfit.ops.sparse_rows import (
    AdamW,
    Resident,
    group_scores,
    resident,
    sparse_rows,
    top_rows,
    top_rows_of_groups,
)

NEAR = 1e-2
"""Relative distance within which a recomputation's inputs are those of a forward."""

KEPT = 8
"""Records of forwards without a graph that a layer remembers: a reentrant checkpoint will recompute them."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all layers share."""

    top_k: int
    cap: int
    groups: int
    probe: int
    gate: str
    selection: str
    scale: float
    retain: str
    lookahead: int
    adamw: AdamW


class Record:
    """The rows of one forward; backward, and a recomputation in it, use the same ones.

    Attributes:
        found: the rows and their places.
        groups: (M, k) group of each token's rows, where there is a gate.
        sample: some of the layer's inputs, to tell its forwards apart.
        world: the process group to sum over, and whether this forward's backward does it; None without.
        open: rows wait for their gradients.
    """

    def __init__(self, found: Resident, groups: np.ndarray | None):
        self.found, self.groups = found, groups
        self.sample: Arriving | None = None
        self.world: tuple[Any, bool] | None = None
        self.open = False


class Run:
    """What a layer remembers for a moment; copies begin with none of it."""

    def __init__(self) -> None:
        self.given: Tensor | None = None
        self.arriving: Arriving | None = None
        self.records: list[weakref.ref[Record]] = []
        self.kept: collections.deque[Record] = collections.deque(maxlen=KEPT)
        self.mask: Tensor | None = None
        self.ahead: tuple[Record | None, Tensor] | None = None
        self.disabled = False
        self.forwards = self.selections = self.capped = self.wanted = self.resident = self.steps = self.moved = 0
        self.mass = self.dropped = self.seconds = 0.0

    def __deepcopy__(self, memo: dict[int, Any]) -> Run:
        twin = memo[id(self)] = Run()
        return twin


class SparseRows(nn.Module):
    """The rows beside one MLP. `link` stands for them in the model: its gradient has their gradients' norm."""

    link: nn.Parameter

    def __init__(self, settings: Settings, shape: Shape, place: int, name: str, ledger: Ledger, like: Tensor):
        super().__init__()
        hollow = ledger.hollow or like.is_meta
        device = torch.device("meta") if hollow else like.device
        self.link = nn.Parameter(torch.zeros(1, dtype=shape.wide, device=device))
        if settings.gate == "sigmoid":
            dtype = like.dtype if like.is_floating_point() else torch.float32
            self.router = nn.Parameter(torch.zeros(settings.groups, shape.size, dtype=dtype, device=device))
        self.settings, self.place, self.name, self.ledger = settings, place, name, ledger
        self.bank = HostBank(shape, hollow=hollow)
        self.later: tuple[SparseRows, ...] = ()
        self.first = True
        self.run = Run()

    def start_router(self) -> None:
        """Begin with the mean key of each group, where the router is trained."""
        if self.settings.gate == "sigmoid":
            keys = self.bank.keys.view(self.settings.groups, -1, self.bank.shape.size)
            with torch.no_grad():
                self.router.copy_(keys.to(self.bank.shape.wide).mean(1))

    # -- forward ----------------------------------------------------------------------------------------------------

    @torch._disable_dynamo  # as torch.compiler.disable, which would import the compiler, and Triton, with the package
    def offer(self, h: Tensor) -> None:
        """The MLP's input; it may travel to the host while the MLP runs."""
        self.run.given = h
        if self.run.disabled or not self._real(h) or h.device.type == "cpu":
            return
        own = self.run.ahead is None and not in_backward()
        if own or (self.settings.lookahead and not in_backward()):
            self.run.arriving = self.ledger.traffic.down(self._flat(h), f"states {self.place % 2}")

    @torch._disable_dynamo  # as torch.compiler.disable, which would import the compiler, and Triton, with the package
    def forward(self, h: Tensor) -> Tensor:
        """(..., d): what the adapter adds to the MLP's output, in the dtype it is computed in."""
        flat = self._flat(h)
        dtype = autocast_dtype(h.device.type) or h.dtype
        trains = self.training and torch.is_grad_enabled() and self.link.requires_grad
        cap = self._slots(len(flat))
        record, slot = self._prepared(flat, dtype, cap)
        places, groups = self._places(record, flat)
        gate = None if groups is None else self._gate(flat, groups, dtype)
        sink, again = self._ways_back(record, flat, slot, trains)
        out = sparse_rows(
            flat,
            slot,
            places,
            scale=self.settings.scale,
            gate=gate,
            link=self.link if trains else None,
            sink=sink,
            again=again,
        )
        del slot
        if self.settings.lookahead and not in_backward():
            self._look_ahead(flat, dtype, cap)
        self.run.arriving = None
        return out.view(h.shape)

    def _flat(self, h: Tensor) -> Tensor:
        return h.reshape(-1, h.shape[-1])

    def _real(self, h: Tensor) -> bool:
        return hfmodel.has_values(h) and not self.bank.hollow

    def _slots(self, tokens: int) -> int:
        """Rows of the slot: it depends on shapes only."""
        return max(1, min(self.settings.cap, tokens * self.settings.top_k))

    def _prepared(self, flat: Tensor, dtype: torch.dtype, cap: int) -> tuple[Record | None, Tensor]:
        """The record of this forward, or of the forward that is recomputed, and its rows."""
        ahead, self.run.ahead = self.run.ahead, None
        if self.first:  # what an unfinished forward has left
            ahead = None
            for layer in self._chain():
                layer.run.ahead = None
        if ahead is not None and _fits(ahead, flat, dtype, cap) and not in_backward():
            return ahead
        del ahead
        recomputed = in_backward()
        seen = None if recomputed else self._seen(len(flat))
        if not self._real(flat):
            return None, flat.new_zeros((cap, 2, flat.shape[1]), dtype=dtype)
        record = self._earlier(flat) if recomputed else None
        if record is None:
            arriving = self.run.arriving or self.ledger.traffic.down(flat, f"states {self.place % 2}")
            record = self._select(flat, arriving, seen, cap)
        return record, self._fetch(record, dtype, cap, flat.device)

    def _fetch(self, record: Record, dtype: torch.dtype, cap: int, device: torch.device) -> Tensor:
        return self.ledger.traffic.fetch(self.bank, record.found, cap, dtype, device)

    def _places(self, record: Record | None, flat: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Places of each token's rows and, where there is a gate, their groups; on the device."""
        gated = self.settings.gate == "sigmoid"
        if self.settings.selection == "union":
            return None, None
        if record is None:
            shape = (len(flat), self.settings.top_k)
            groups = flat.new_zeros(shape, dtype=torch.int64) if gated else None
            return flat.new_zeros(shape, dtype=torch.int32), groups
        up = self.ledger.traffic.up
        groups = up(record.groups, torch.int64, flat.device) if record.groups is not None else None
        return up(record.found.places, torch.int32, flat.device), groups

    def _gate(self, flat: Tensor, groups: Tensor, dtype: torch.dtype) -> Tensor:
        logits = flat.to(self.router.dtype) @ self.router.t()
        return torch.sigmoid(logits.gather(1, groups)).to(dtype)

    def _ways_back(self, record: Record | None, flat: Tensor, slot: Tensor, trains: bool):
        """Where the rows' gradient goes, and how backward gets the rows once more."""
        cap, device, dtype = len(slot), slot.device, slot.dtype
        again = None
        if self.settings.retain == "refetch" and torch.is_grad_enabled():
            if record is None:
                size = slot.shape[2]
                again = lambda: torch.zeros((cap, 2, size), dtype=dtype, device=device)  # noqa: E731
            else:
                again = functools.partial(self._fetch, record, dtype, cap, device)
        if not trains:
            if record is not None and self.training and not torch.is_grad_enabled():
                record.world, record.sample = distributed_call(), self.ledger.traffic.sample(flat)
                self.run.kept.append(record)
            return None, again
        if record is None:
            return _swallow, again
        if not in_backward():
            record.world = distributed_call()
        if record.world is None and processes.count() > 1:
            raise StateError(
                f"SparseAdapter: {self.name} trains in one of {processes.count()} processes, but not inside of "
                f"DistributedDataParallel, so nothing would sum its rows' gradients over the processes; let the "
                f"Trainer or Accelerator.prepare wrap the model in DDP, and call what they return. The rows cannot be "
                f"trained under FSDP or DeepSpeed"
            )
        known_to_optimizers(self)
        if not in_backward():
            record.open = True
            record.sample = self.ledger.traffic.sample(flat)
            self.run.records = [ref for ref in self.run.records if ref() is not None]
            self.run.records.append(weakref.ref(record))
        return functools.partial(self.ledger.collect, self, record), again

    # -- selection --------------------------------------------------------------------------------------------------

    def _select(self, flat: Tensor, arriving: Arriving, seen: Tensor | None, cap: int) -> Record:
        """Each token's rows, and which of them become resident."""
        start = time.perf_counter()
        settings, shape, traffic = self.settings, self.bank.shape, self.ledger.traffic
        valid = None if seen is None else traffic.down(seen, "valid").wait().numpy() > 0.5
        logits = None
        if settings.gate == "sigmoid":
            with torch.no_grad():
                made = flat.detach().to(self.router.dtype) @ self.router.t()
            logits = traffic.wide(traffic.down(made, "logits").wait(), shape.wide, "wide logits")
        q = traffic.wide(arriving.wait(), shape.wide, "wide states")
        valid = self._finite(q, valid, flat.dtype)
        if settings.groups > 1:
            if logits is None:
                logits = group_scores(q, torch.from_numpy(self.bank.router), traffic.work)
            rows, scores = top_rows_of_groups(q, self.bank.keys, settings.top_k, logits, settings.probe, traffic.work)
        else:
            rows, scores = top_rows(q, self.bank.keys, settings.top_k, traffic.work)
        found = resident(rows, scores, valid, shape.width, cap)
        groups = rows.numpy() // (shape.width // settings.groups) if settings.gate == "sigmoid" else None
        self._count(found, time.perf_counter() - start)
        return Record(found, groups)

    def _seen(self, tokens: int) -> Tensor | None:
        """(M,) above 0.5 for tokens that are no padding; None where nothing tells."""
        with attention_masks(self.run.mask):
            return masked_rows(tokens)

    def _finite(self, q: Tensor, valid: np.ndarray | None, dtype: torch.dtype) -> np.ndarray | None:
        """The tokens that have a say. Raises: NotFiniteError, but for half precision, whose scaler skips the step."""
        if np.isfinite(float(q.sum())):
            return valid
        good = torch.isfinite(q).all(1).numpy()
        bad = ~good if valid is None else ~good & valid
        if bad.any() and dtype != torch.float16 and autocast_dtype("cuda") != torch.float16:
            raise NotFiniteError(
                f"SparseAdapter: the hidden states that {self.name} gets are not finite for {int(bad.sum())} of "
                f"{len(q)} tokens, so no rows can be chosen; look at the loss and the learning rate of earlier steps"
            )
        return good if valid is None else good & valid

    def _earlier(self, flat: Tensor) -> Record | None:
        """The record of the forward that is being recomputed; None where it was not kept."""
        alive = [record for ref in self.run.records if (record := ref()) is not None]
        same = [record for record in (*alive, *self.run.kept) if len(record.found.places) == len(flat)]
        if len(same) == 1 and same[0] not in self.run.kept:
            return same[0]
        # the nearest one: a recomputation may go through other kernels, so bits may differ
        sample = self.ledger.traffic.sample(flat).wait().double()
        gaps = [(float((record.sample.wait().double() - sample).norm()), record) for record in same if record.sample]
        gap, nearest = min(gaps, key=lambda pair: pair[0], default=(math.inf, None))
        return nearest if gap <= NEAR * float(sample.norm()) else None

    def _chain(self) -> list[SparseRows]:
        found: list[SparseRows] = []
        layer: SparseRows | None = self
        while layer is not None:
            found.append(layer)
            layer = layer.later[0] if layer.later else None
        return found

    def _look_ahead(self, flat: Tensor, dtype: torch.dtype, cap: int) -> None:
        """Choose the rows of a later layer by this layer's input, and send them on their way."""
        chain = self._chain()
        if len(chain) <= self.settings.lookahead:
            return
        layer = chain[self.settings.lookahead]
        seen = self._seen(len(flat))
        if not self._real(flat):
            layer.run.ahead = (None, flat.new_zeros((cap, 2, flat.shape[1]), dtype=dtype))
            return
        arriving = self.run.arriving or self.ledger.traffic.down(flat, f"states {self.place % 2}")
        record = layer._select(flat, arriving, seen, cap)
        layer.run.ahead = (record, layer._fetch(record, dtype, cap, flat.device))

    def _count(self, found: Resident, seconds: float) -> None:
        run = self.run
        run.selections += 1
        run.wanted += found.wanted
        run.resident += len(found.rows)
        run.mass += found.mass
        run.dropped += found.dropped * found.mass
        run.seconds += seconds
        if found.dropped:
            run.capped += 1
            self.ledger.warn_of_cap(self, found)

    # -- saving -----------------------------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.bank.hollow:
            destination.update({prefix + name: tensor for name, tensor in self.bank.state()})

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        names = ("rows", "exp_avg", "exp_avg_sq", "step", *(() if hasattr(self, "router") else ("router",)))
        found = {name: state_dict.pop(prefix + name) for name in names if prefix + name in state_dict}
        if "rows" not in found:
            missing.append(f"{prefix}rows")
        elif not self.bank.hollow:
            self.load_rows(found)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)

    def check_rows(self, rows: Tensor) -> None:
        """Raise ArtifactError where these are rows of another adapter."""
        own = (self.bank.shape.width, 2, self.bank.shape.size)
        if tuple(rows.shape) != own:
            raise ArtifactError(
                f"SparseAdapter: the saved rows of {self.name} are {list(rows.shape)}, this adapter's are {list(own)} "
                f"(width, key and value, size); apply the recipe they were saved with, on the same base"
            )

    def load_rows(self, found: dict[str, Tensor]) -> None:
        """Take saved rows, and Adam's state where it is there."""
        self.check_rows(found["rows"])
        self.bank.load(found)


def _swallow(grad: Tensor) -> None:
    """The rows' gradient of a simulated step."""


def _fits(ahead: tuple[Record | None, Tensor], flat: Tensor, dtype: torch.dtype, cap: int) -> bool:
    """Whether rows that were chosen by an earlier layer's input are for a call like this one."""
    record, slot = ahead
    return (
        len(slot) == cap
        and slot.dtype == dtype
        and slot.device == flat.device
        and (record is None or len(record.found.places) == len(flat))
    )


class NotesMask:
    """A block that tells its adapter which positions are padding."""

    def forward(self, *args, **kwargs):
        state = state_of(self, NotesMask)  # type: ignore[arg-type]
        run, at = state["rows"].run, state["at"]
        run.mask = kwargs.get("attention_mask", args[at] if at is not None and at < len(args) else None)
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            run.mask = None


class TakesInput:
    """The first layer of an MLP, whose input the adapter reads too."""

    def forward(self, x, *args, **kwargs):
        state_of(self, TakesInput)["rows"].offer(x)  # type: ignore[arg-type]
        return super().forward(x, *args, **kwargs)  # type: ignore[misc]


class AddsRows:
    """The last layer of an MLP, which adds what the adapter makes."""

    def forward(self, x, *args, **kwargs):
        rows = state_of(self, AddsRows)["rows"]  # type: ignore[arg-type]
        given, rows.run.given = rows.run.given, None
        out = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        if given is None or rows.run.disabled:
            return out
        return out + rows(given).to(out.dtype)
