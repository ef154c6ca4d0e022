"""SparseAdapter: a very wide adapter in host memory, of which each token uses few rows (MEFT, ACL 2024)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from tightfit.core import hfmodel
from tightfit.core.edits import ChildEdit, Edit, ModulesEdit, TrainableEdit
from tightfit.core.fields import check_bool, check_choice, check_float, check_int, check_selector, keep_tuples
from tightfit.core.transform import Context, Slot, Transform
from tightfit.methods.sparse_adapter.errors import HostMemoryError, NotFiniteError
from tightfit.methods.sparse_adapter.layer import AddsRows, NotesMask, Settings, TakesInput
from tightfit.methods.sparse_adapter.part import HoldEdit, HostRows, Making
from tightfit.methods.sparse_adapter.places import chosen_mlps
from tightfit.ops.sparse_rows import AdamW

if TYPE_CHECKING:
    from tightfit.core.apply import Applied

__all__ = ["HostMemoryError", "HostRows", "NotFiniteError", "SparseAdapter"]

CHILD = "sparse_rows"
TRAINED = "SparseAdapter trained (a ReLU branch beside each MLP)"
RESIDENT = 3072
PROBED = 8
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseAdapter(Transform):
    """A ReLU adapter of `width` rows beside each MLP, kept with its optimizer state in the host's memory.

    Each token adds s * sum of ReLU(h . K_i) V_i over its own `top_k` rows of largest score. A forward moves only the
    rows that its tokens chose, at most `max_resident` a layer, so the device's memory does not depend on the width.
    The stock parameters are frozen. Rows are updated by AdamW on the host, each with its own step count, when the
    optimizer that holds the model's parameters steps: with its learning rate, and scaled as clipping and a gradient
    scaler have scaled everything. The host needs 16 bytes per number of the adapter (2 * width * d a layer).

    Fields:
        width: rows per layer.
        top_k: rows per token.
        max_resident: rows per layer that may be on the device at once; None: 3072, or the width. Beyond it the rows
            of the smallest summed scores are dropped, counted, and warned of once.
        groups, probe: rows in equal groups; a token scores only the rows of its `probe` best groups. "auto": the
            divisor of the width nearest to 4 sqrt(width). probe=None: 8.
        gate: what chooses groups: "none", their mean keys; "sigmoid", a trained router whose sigmoid also weighs a row.
        selection: "token"; "union" lets every token use every resident row, which leaks later tokens into earlier ones.
        scale: s.
        retain: "keep" the rows of all layers on the device until backward, or "refetch" them.
        lookahead: choose a layer's rows by the input of the layer this many before it, while the device computes; 0:
            by its own.
        init: keys are "normal" numbers, or the rows of the "mlp"'s own first layer; values are zero.
        dtype: of the rows on the host: "float32", "bfloat16"; None: float32 (float64 for a float64 model).
        store: "memory", or "disk": files in the temporary folder, for rows that the memory cannot hold.
        betas, eps, weight_decay: of AdamW; decay moves only rows that have a gradient.
        freeze: freeze the stock parameters but for a task head.
        seed: of the keys; nothing is drawn from torch's random state.
        where: which MLPs (patterns, `|` between them, for the modules that hold them); None: those of all blocks.

    Raises:
        TypeError, ValueError: a field out of range, or fields that do not go together.
        SelectorError: `where` names no MLP (when planned or applied).
        UnsupportedModelError: the model has no MLPs (when planned or applied).
        HostMemoryError: the host has no room for the rows; nothing is allocated (when applied).
        NotFiniteError, StateError: see the card (in a step).

    Example:
        >>> import tightfit
        >>> tightfit.chain(tightfit.SparseAdapter(width=16384, groups="auto"))
        chain(SparseAdapter(width=16384, groups='auto'))

    Source: MEFT, Hao et al., ACL 2024 (arXiv 2406.04984), sections 3 and 4. Deviations: each token uses its own rows,
    not those of the whole batch; the router is trained (or is the mean keys); steps are counted per row.
    """

    width: int = 6144
    top_k: int = 64
    max_resident: int | None = None
    groups: int | str = 1
    probe: int | None = None
    gate: str = "none"
    selection: str = "token"
    scale: float = 1.0
    retain: str = "keep"
    lookahead: int = 0
    init: str = "normal"
    dtype: str | None = None
    store: str = "memory"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    freeze: bool = True
    seed: int = 0
    where: str | None = None

    name: ClassVar[str] = "sparse-adapter"
    paper: ClassVar[str] = "2406.04984"
    touches: ClassVar[frozenset[Slot]] = frozenset({Slot.TRAINABLE, Slot.NEW_PARAMETERS, Slot.BLOCKS})
    exact: ClassVar[bool] = False
    reversible: ClassVar[bool] = True
    summary: ClassVar[str] = "very wide adapters in host memory; each token uses few of their rows"

    def __post_init__(self) -> None:
        check_int(self, "width", 1)
        check_int(self, "top_k", 1, self.width)
        check_int(self, "max_resident", 1, optional=True)
        check_choice(self, "gate", ("none", "sigmoid"))
        check_choice(self, "selection", ("token", "union"))
        check_choice(self, "retain", ("keep", "refetch"))
        check_choice(self, "init", ("normal", "mlp"))
        check_choice(self, "dtype", (None, *DTYPES))
        check_choice(self, "store", ("memory", "disk"))
        check_float(self, "scale", -math.inf)
        check_int(self, "lookahead", 0)
        check_float(self, "eps", 0, open_low=True)
        check_float(self, "weight_decay", 0)
        check_bool(self, "freeze")
        check_int(self, "seed", 0)
        check_selector(self, "where", optional=True)
        self._check_betas()
        if self.resident_rows < self.top_k:
            raise ValueError(
                f"SparseAdapter(max_resident={self.resident_rows}, top_k={self.top_k}): one token could not have its "
                f"rows; give max_resident >= {self.top_k}"
            )
        self._check_groups()

    def _check_betas(self) -> None:
        keep_tuples(self, "betas")
        pair = isinstance(self.betas, tuple) and len(self.betas) == 2
        if not pair or any(isinstance(b, bool) or not isinstance(b, int | float) for b in self.betas):
            raise TypeError(f"SparseAdapter(betas=...): got {self.betas!r}, accepted is a pair of numbers")
        if not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"SparseAdapter(betas=...): got {self.betas}, accepted are two numbers in [0, 1)")

    def _check_groups(self) -> None:
        if isinstance(self.groups, str):
            check_choice(self, "groups", ("auto",))
        else:
            check_int(self, "groups", 1)
        if self.probe is not None:
            check_int(self, "probe", 1)
        count, probed = self.group_count, self.probed_groups
        if self.width % count:
            near = sorted(_divisors(self.width), key=lambda n: (abs(n - count), n))[:2]
            raise ValueError(
                f"SparseAdapter(groups={count}): the width {self.width} is not a multiple of it; give a divisor, the "
                f"nearest are {' and '.join(map(str, sorted(near)))}"
            )
        if probed > count:
            raise ValueError(f"SparseAdapter(probe={probed}): got {probed} of {count} groups, accepted is 1 to {count}")
        if probed * self.width // count < self.top_k:
            raise ValueError(
                f"SparseAdapter(probe={probed}, groups={count}): {probed} groups hold {probed * self.width // count} "
                f"rows, fewer than top_k={self.top_k}; give a larger probe or fewer groups"
            )
        if self.gate == "sigmoid" and (count == 1 or self.selection == "union"):
            raise ValueError(
                "SparseAdapter(gate='sigmoid'): a router needs groups, and weighs each token's own rows; "
                "give groups > 1 and selection='token', or gate='none'"
            )

    @property
    def resident_rows(self) -> int:
        """Rows per layer that may be on the device at once."""
        return min(self.width, RESIDENT) if self.max_resident is None else min(self.width, self.max_resident)

    @property
    def group_count(self) -> int:
        """Number of groups.

        >>> SparseAdapter(width=16384, groups="auto").group_count
        512
        """
        if isinstance(self.groups, int):
            return self.groups
        probed = PROBED if self.probe is None else self.probe
        large = [n for n in _divisors(self.width) if min(probed, n) * (self.width // n) >= self.top_k]
        return min(large, key=lambda n: (abs(n - 4 * math.sqrt(self.width)), n))

    @property
    def probed_groups(self) -> int:
        """Groups that each token scores."""
        return min(PROBED, self.group_count) if self.probe is None else self.probe

    def is_exact(self) -> bool:
        return False

    def freezes(self, model: nn.Module) -> Iterator[str]:
        if not self.freeze:
            return iter(())
        return hfmodel.body_parameters(model)

    @staticmethod
    def of(applied: Applied) -> HostRows:
        """The rows of an applied recipe: `SparseAdapter.of(applied).disabled()`."""
        return applied.part(HostRows)

    def edits(self, model: nn.Module, context: Context) -> Iterator[Edit]:
        mlps = chosen_mlps(model, self.where)
        part = HostRows(self._making(model), mlps)
        if self.freeze:
            yield TrainableEdit(parameters=tuple(self.freezes(model)), trainable=False)
        for number, mlp in enumerate(mlps):
            note = f"{self.width:,} rows of {mlp.width}, {self.top_k} a token"
            yield ChildEdit(
                module=mlp.block, child=CHILD, make=part.maker(number), trained=TRAINED, note=note, part=part
            )
        count = f"{len(mlps)} adapters beside MLPs"
        for kind, mixin, find in (
            ("adapter mask", NotesMask, part.blocks),
            ("adapter input", TakesInput, lambda model: part.layers_named(model, "up")),
            ("adapter sum", AddsRows, lambda model: part.layers_named(model, "down")),
        ):
            yield ModulesEdit(slot=Slot.BLOCKS, kind=kind, mixin=mixin, find=find, note=count)
        yield HoldEdit(blocks=tuple(mlp.block for mlp in mlps), rows=part)

    def _making(self, model: nn.Module) -> Making:
        settings = Settings(
            top_k=self.top_k,
            cap=self.resident_rows,
            groups=self.group_count,
            probe=self.probed_groups,
            gate=self.gate,
            selection=self.selection,
            scale=self.scale,
            retain=self.retain,
            lookahead=self.lookahead,
            adamw=AdamW(self.betas, self.eps, self.weight_decay),
        )
        dtype = None if self.dtype is None else DTYPES[self.dtype]
        spread = float(getattr(getattr(model, "config", None), "initializer_range", 0.02))
        return Making(self.width, settings, dtype, self.store, self.init, self.seed, spread)


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
