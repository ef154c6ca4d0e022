"""The living side of an applied SparseAdapter: its layers, their report, what is saved, and leaving."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from tightfit.core import hfmodel
from tightfit.core.edits import Edit, Handle, Part, is_planning
from tightfit.core.errors import ArtifactError
from tightfit.core.transform import Slot
from tightfit.methods.sparse_adapter.bank import Shape, check_room
from tightfit.methods.sparse_adapter.layer import Settings, SparseRows
from tightfit.methods.sparse_adapter.ledger import Ledger
from tightfit.methods.sparse_adapter.places import Mlp


@dataclasses.dataclass(frozen=True)
class Making:
    """How layers are made.

    Attributes:
        width: rows of each.
        settings: what they must know.
        dtype: of the rows; None: float32, float64 for a float64 model.
        store: "memory" or "disk".
        init: "normal" or "mlp".
        seed: of the keys.
        spread: standard deviation of normal keys.
    """

    width: int
    settings: Settings
    dtype: torch.dtype | None
    store: str
    init: str
    seed: int
    spread: float


class HostRows(Part):
    """The rows of an applied `SparseAdapter`."""

    in_model_state = True

    def __init__(self, making: Making, mlps: Sequence[Mlp]):
        self.making, self.mlps = making, mlps
        self.layers: list[SparseRows] = []
        self.ledger: Ledger | None = None

    # -- making ------------------------------------------------------------------------------------------------------

    def maker(self, number: int):
        """Makes the adapter of one MLP, given its block."""
        return lambda block: self._make(number, block)

    def _make(self, number: int, block: nn.Module) -> SparseRows:
        how, mlp = self.making, self.mlps[number]
        like = next((p for p in block.parameters() if p.is_floating_point()), next(block.parameters()))
        shape = self._shape(mlp, like.dtype)
        hollow = is_planning() or like.is_meta
        if self.ledger is None:
            self.ledger = Ledger(hollow)
            if not hollow:
                check_room(sum(self._shape(m, like.dtype).nbytes for m in self.mlps), shape, len(self.mlps))
        layer = SparseRows(how.settings, shape, number, mlp.name, self.ledger, like)
        layer.train(block.training)
        if not hollow:
            up = hfmodel.stock_module(block, mlp.up.removeprefix(f"{mlp.block}."))
            rows = _rows_of(up) if how.init == "mlp" else None
            layer.bank.draw(how.spread, (how.seed, number), rows)
            layer.start_router()
        self._chain(layer, mlp)
        self.layers.append(layer)
        return layer

    def _chain(self, layer: SparseRows, mlp: Mlp) -> None:
        """Layers of one stack follow each other."""
        last = self.layers[-1] if self.layers else None
        if last is not None and _stack(self.mlps[last.place].block) == _stack(mlp.block):
            last.later, layer.first = (layer,), False

    def _shape(self, mlp: Mlp, dtype: torch.dtype) -> Shape:
        how = self.making
        wanted = torch.float64 if dtype == torch.float64 else torch.float32
        groups = how.settings.groups
        means = groups if groups > 1 and how.settings.gate == "none" else 0
        return Shape(how.width, mlp.width, how.dtype or wanted, means, how.store)

    def blocks(self, model: nn.Module) -> list[tuple[nn.Module, dict[str, Any]]]:
        """The blocks, each with its adapter and the place of the mask in its call."""
        found = []
        for layer in self.layers:
            block = hfmodel.stock_module(model, self.mlps[layer.place].block)
            names = list(inspect.signature(block.forward).parameters)
            at = names.index("attention_mask") if "attention_mask" in names else None
            found.append((block, {"rows": layer, "at": at}))
        return found

    def layers_named(self, model: nn.Module, which: str) -> list[tuple[nn.Module, dict[str, Any]]]:
        """First or last layers of the MLPs, an adapter over them included."""
        names = (getattr(self.mlps[layer.place], which) for layer in self.layers)
        return [(model.get_submodule(name), {"rows": layer}) for name, layer in zip(names, self.layers)]

    # -- using -------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """The model without its adapters, for a while."""
        for layer in self.layers:
            layer.run.disabled = True
        try:
            yield
        finally:
            for layer in self.layers:
                layer.run.disabled = False

    def close(self) -> None:
        """Let go of the host's memory."""
        for layer in self.layers:
            layer.bank.close()

    def report(self) -> dict[str, Any]:
        runs = [layer.run for layer in self.layers]
        selections = sum(run.selections for run in runs)
        mass = sum(run.mass for run in runs)
        traffic = None if self.ledger is None else self.ledger.traffic
        moved = sum(layer.run.steps * layer.bank.shape.width for layer in self.layers)
        return {
            "layers": len(self.layers),
            "rows": sum(layer.bank.shape.width for layer in self.layers),
            "host_bytes": self.host_bytes(),
            "selections": selections,
            "rows_wanted": sum(run.wanted for run in runs) / max(1, selections),
            "rows_resident": sum(run.resident for run in runs) / max(1, selections),
            "cap_hits": sum(run.capped for run in runs),
            "dropped_share": sum(run.dropped for run in runs) / mass if mass else 0.0,
            "selection_seconds": sum(run.seconds for run in runs),
            "steps": max((run.steps for run in runs), default=0),
            "touched_share": sum(run.moved for run in runs) / moved if moved else 0.0,
            "bytes_to_device": 0 if traffic is None else traffic.bytes_up,
            "bytes_to_host": 0 if traffic is None else traffic.bytes_down,
        }

    def host_bytes(self) -> int:
        return sum(layer.bank.shape.nbytes for layer in self.layers)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {f"{layer.name}/rows": layer.bank.tensor("rows") for layer in self.layers if not layer.bank.hollow}

    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        wanted = {f"{layer.name}/rows" for layer in self.layers}
        if wanted != set(tensors):
            raise ArtifactError(
                f"SparseAdapter: the file holds rows of {len(tensors)} MLPs, this adapter stands beside {len(wanted)}; "
                f"different are {sorted(wanted ^ set(tensors))[:3]}"
            )
        for layer in self.layers:
            layer.check_rows(tensors[f"{layer.name}/rows"])
        for layer in self.layers:
            layer.load_rows({"rows": tensors[f"{layer.name}/rows"]})

    def training_tensors(self) -> dict[str, torch.Tensor]:
        state = ((layer, name, t) for layer in self.layers if not layer.bank.hollow for name, t in layer.bank.state())
        return {f"{layer.name}/{name}": tensor for layer, name, tensor in state if name != "rows"}

    def load_training_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        for layer in self.layers:
            prefix = f"{layer.name}/"
            found = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
            layer.load_rows({"rows": layer.bank.tensor("rows"), **found})


def _rows_of(up: Any) -> torch.Tensor:
    """(inner, d): the weights of an MLP's first layer, a row for each of its hidden units."""
    return up.weight.t() if hfmodel.is_conv1d(up) else up.weight


def _stack(block: str) -> str:
    return block.rpartition(".")[0]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class HoldEdit(Edit):
    """Holds the blocks against those that run them twice on their own, and the rows until they are taken off."""

    slot: Slot = Slot.BLOCKS
    blocks: tuple[str, ...]
    rows: HostRows

    @property
    def target(self) -> str:
        return "(blocks)"

    def claims(self):
        return frozenset((self.slot, block) for block in self.blocks)

    def run(self, model: nn.Module) -> Handle:
        if self.rows.making.settings.selection == "union" and _is_causal(model) and not is_planning():
            warnings.warn(
                f"SparseAdapter(selection='union'): every token uses the rows that later ones have chosen, so "
                f"{type(model).__name__} sees what it shall predict; use selection='token'",
                UserWarning,
                stacklevel=4,
            )
        return _HoldHandle(self.rows)


def _is_causal(model: Any) -> bool:
    config = getattr(model, "config", None)
    told = any(getattr(config, key, False) for key in ("is_decoder", "is_encoder_decoder"))
    return told or any(getattr(module, "is_causal", False) is True for module in model.modules())


class _HoldHandle(Handle):
    def __init__(self, rows: HostRows):
        self.rows = rows

    def undo(self, model: nn.Module) -> None:
        self.rows.close()
