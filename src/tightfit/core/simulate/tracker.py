"""The tracker: one list of what a simulated step allocates and frees, operator by operator.

A dispatch mode pushed on top of the fake mode. A storage not seen before is an allocation, its death (a weak
reference) a free; both are appended to one list of events, and everything else (peak, categories, plot, rounding
and replay for CUDA) is read from that list afterwards.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import weakref
from collections.abc import Mapping
from types import FrameType
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from tightfit.core.simulate import counts, hidden
from tightfit.core.simulate.attribution import Attribution
from tightfit.core.simulate.shadow import (
    SCALAR_BYTES,
    VALUE_LIMIT_BYTES,
    Faker,
    is_small_value,
    real_mode,
    set_value,
    value_of,
)

aten = torch.ops.aten
PHASES = ("setup", "forward", "backward", "recompute", "clip", "optimizer", "zero_grad")
SETUP, FORWARD, BACKWARD, RECOMPUTE, CLIP, OPTIMIZER, ZERO_GRAD = range(len(PHASES))


_NO_WORK = ("prim", "profiler")
_HIGHEST = 1 - 2**-8
"""A number below 1 in every type that numbers are drawn in."""


@dataclasses.dataclass
class Trace:
    """What a tracker saw. Operator number i is dispatched, allocates, and frees before operator i + 1.

    Attributes:
        events: (operator, storage, bytes), negative bytes for a free, in order.
        names, phases, modules: per operator.
        joins: (operator, storage of the first operand, storage of the sum): second gradients of one tensor.
        signatures: operator -> what is needed to run it alone (only those that may hide memory).
        static: storage -> bytes alive before the step.
        categories: storage -> category, where it is known.
        saved: storages packed for backward.
        marks: (phase, number of events before it), in order.
    """

    events: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)
    names: list[str] = dataclasses.field(default_factory=list)
    phases: list[int] = dataclasses.field(default_factory=list)
    modules: list[str] = dataclasses.field(default_factory=list)
    joins: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)
    signatures: dict[int, hidden.Signature] = dataclasses.field(default_factory=dict)
    static: dict[int, int] = dataclasses.field(default_factory=dict)
    categories: dict[int, str] = dataclasses.field(default_factory=dict)
    saved: set[int] = dataclasses.field(default_factory=set)
    marks: list[tuple[int, int]] = dataclasses.field(default_factory=list)


class Tracker(TorchDispatchMode):
    """Records a `Trace` and `Counts`; `phase` and `attribution` say where an operator belongs.

    Enter it inside the fake mode. `count_saved()` is a context for the forward pass.
    """

    def __init__(self, attribution: Attribution, faker: Faker):
        super().__init__()
        self.attribution = attribution
        self.faker = faker
        self.trace = Trace()
        self.counts = counts.Counts()
        self.failed: tuple[str, str] | None = None
        self.phase = SETUP
        self._storages: dict[int, tuple[int, weakref.ref]] = {}
        self._sizes: list[int] = []

    def begin(self, phase: int) -> None:
        """Enter a phase of the step."""
        self.phase = phase
        self.trace.marks.append((phase, len(self.trace.events)))

    def close(self) -> None:
        """Stop watching: what dies from now on is no part of the step.

        Watched storages must not be left to the cyclic collector: callbacks from inside a collection crash torch.
        """
        self._storages.clear()

    # -- storages ---------------------------------------------------------------------------------------------

    def storage_id(self, tensor: torch.Tensor) -> int | None:
        """Number of the tensor's storage, or None where it was never recorded."""
        entry = self._storages.get(tensor.untyped_storage()._cdata)
        return entry[0] if entry is not None else None

    def static(self, tensors, category: str) -> None:
        """Record tensors that are alive before the step."""
        for tensor in tensors:
            for part in _plain(tensor):
                storage = part.untyped_storage()
                if storage._cdata not in self._storages:
                    number = self._add(storage, -1, record=False)
                    self.trace.static[number] = self._sizes[number]
                    self.trace.categories[number] = category

    def ignore(self, tensors) -> None:
        """Tensors whose memory the allocator does not hold: their views are no allocations."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._storages:
                number = self._add(storage, -1, record=False)
                self._sizes[number] = 0
                self.trace.static[number] = 0
                self.trace.categories[number] = "host"

    def adopt(self, states: Mapping[Any, dict[str, Any]]) -> None:
        """Put fake twins in the place of real tensors in an optimizer's state; those of single numbers keep them."""
        for state in states.values():
            for key, item in state.items():
                if isinstance(item, torch.Tensor) and type(item) is not FakeTensor:
                    with real_mode():
                        state[key] = self.faker(item)
                        set_value(state[key], item.clone() if is_small_value(item) else None)

    def forget(self, tensors) -> None:
        """Take static tensors back: the real step never makes them."""
        for tensor in tensors:
            number = self.storage_id(tensor)
            if number in self.trace.static:
                self._sizes[number] = self.trace.static[number] = 0

    def move_to_start(self, tensors, category: str) -> None:
        """Count tensors made during the step as alive before it: a cold step then reads as a warm one."""
        found = (self.storage_id(part) for tensor in tensors for part in _plain(tensor))
        numbers = {number for number in found if number is not None}
        for number in numbers - self.trace.static.keys():
            self.trace.static[number] = self._sizes[number]
            self.trace.categories[number] = category
        trace = self.trace
        gone = list(itertools.accumulate((e[1] in numbers for e in trace.events), initial=0))
        trace.marks = [(phase, at - gone[at]) for phase, at in trace.marks]
        trace.events = [e for e in trace.events if e[1] not in numbers]

    def mark(self, tensors, category: str) -> None:
        """Name the category of storages that are alive now."""
        for tensor in tensors:
            for part in _plain(tensor):
                number = self.storage_id(part)
                if number is not None:
                    self.trace.categories.setdefault(number, category)

    def record_external(self, tensor: torch.Tensor) -> None:
        """Record a real tensor that was made without dispatch (the state of a generator)."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._storages:
            self._operator("external")
            self._add(storage, len(self.trace.names) - 1)

    def _add(self, storage: torch.UntypedStorage, operator: int, record: bool = True) -> int:
        number = len(self._sizes)
        size = storage.nbytes()
        self._sizes.append(size)
        key = storage._cdata
        storages, sizes, trace = self._storages, self._sizes, self.trace

        def freed(_, key=key, number=number):
            entry = storages.get(key)
            if entry is not None and entry[0] == number:
                del storages[key]
            trace.events.append((len(trace.names) - 1, number, -sizes[number]))

        self._storages[key] = (number, weakref.ref(storage, freed))
        if record:
            self.trace.events.append((operator, number, size))
        return number

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Record that a known storage changed its size."""
        entry = self._storages.get(storage._cdata)
        if entry is not None:
            number, size = entry[0], storage.nbytes()
            if size != self._sizes[number]:
                self.trace.events.append((len(self.trace.names) - 1, number, size - self._sizes[number]))
                self._sizes[number] = size

    # -- operators --------------------------------------------------------------------------------------------

    def _operator(self, name: str) -> int:
        trace, attribution = self.trace, self.attribution
        phase = self.phase
        if phase == BACKWARD and attribution.stack:
            phase = RECOMPUTE
        trace.names.append(name)
        trace.phases.append(phase)
        trace.modules.append(attribution.path(phase))
        return len(trace.names) - 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace in _NO_WORK:
            return func(*args, **kwargs)
        facts = counts.facts(func)
        inputs = _tensors(args, kwargs)
        if any(type(t) is not FakeTensor and t.is_meta for t in inputs):
            args, kwargs = self._on_cpu(args), self._on_cpu(kwargs)
            inputs = _tensors(args, kwargs)
        if facts.reads_value and inputs:
            value = value_of(inputs[0])
            if value is not None:
                with real_mode():
                    return value.item()
        try:
            if func is aten._grouped_mm.default:
                out = _grouped_mm(*args, **kwargs)
            else:
                out = self._known_shape(func, args, kwargs, inputs) if facts.dynamic else func(*args, **kwargs)
        except Exception:
            if self.failed is None:
                self.failed = (str(func), self.attribution.path(self.phase))
            raise
        outputs = _outputs(out)
        if facts.view:
            storages = self._storages
            for tensor in outputs:  # a view of something never seen: a constant that was captured
                if tensor.untyped_storage()._cdata not in storages:
                    self._add(tensor.untyped_storage(), self._operator(facts.name))
        else:
            number = self._operator(facts.name)
            self._record(number, func, facts, args, kwargs, inputs, outputs)
        if facts.writes or outputs:
            self._follow(func, facts, args, kwargs, inputs, outputs)
        return out

    def _on_cpu(self, item):
        """A skeleton's state that its owner shares between copies is still on `meta`: a host store in the model."""
        if isinstance(item, torch.Tensor):
            if type(item) is FakeTensor or not item.is_meta:
                return item
            twin = self.faker(item)
            self.ignore([twin])
            return twin
        if isinstance(item, (list, tuple)):
            return type(item)(self._on_cpu(i) for i in item)
        return {key: self._on_cpu(i) for key, i in item.items()} if isinstance(item, dict) else item

    def _record(self, number, func, facts, args, kwargs, inputs, outputs) -> None:
        storages = self._storages
        fresh = None
        for tensor in outputs:
            storage = tensor.untyped_storage()
            entry = storages.get(storage._cdata)
            if entry is None:
                fresh = self._add(storage, number)
            elif storage.nbytes() != self._sizes[entry[0]]:
                self.resized(storage)
        if facts.add and self.phase == BACKWARD and fresh is not None and len(inputs) == 2:
            first = inputs[0]
            if first._base is None and first.shape == outputs[0].shape and _from_engine():
                owner = storages.get(first.untyped_storage()._cdata)
                if owner is not None and self._sizes[owner[0]] == self._sizes[fresh]:
                    self.trace.joins.append((number, owner[0], fresh))
        if facts.hides is not None and facts.hides(inputs):
            self.trace.signatures[number] = hidden.signature(func, args, kwargs)
        self.counts.add(self.trace.phases[number], func, facts, args, kwargs, inputs, outputs)

    # -- real values ------------------------------------------------------------------------------------------

    def _follow(self, func, facts, args, kwargs, inputs, outputs) -> None:
        """Rerun for real an operator whose inputs all have values, so that its outputs have one too."""
        if self._is_known(facts, inputs, outputs):
            with real_mode():
                values = _outputs(func(*_real(args), **_real(kwargs)))
            for tensor, value in zip(outputs, values):
                set_value(tensor, value)
        elif func is aten.rand.default and outputs[0].numel() == 1:
            # drawn to leave something out (LayerDrop, an adapter's module_dropout): in the largest step nothing is
            with real_mode():
                set_value(outputs[0], torch.full(outputs[0].shape, _HIGHEST, dtype=outputs[0].dtype))
        elif facts.writes:  # written to with something unknown
            for tensor in _tensors([args[i] for i in facts.writes if i < len(args)], kwargs):
                if value_of(tensor) is not None:
                    set_value(tensor, None)

    def _is_known(self, facts, inputs, outputs) -> bool:
        if facts.random:
            return False
        for tensor in inputs:
            if value_of(tensor) is None and (facts.writes or not is_small_value(tensor)):
                return False
        if not inputs and (not outputs or facts.uninitialised):
            return False
        size = 0
        for tensor in outputs:
            size += tensor.numel() * tensor.element_size()
        if size <= SCALAR_BYTES:
            return True
        return size <= VALUE_LIMIT_BYTES and (not inputs or not outputs[0].dtype.is_floating_point)

    def _known_shape(self, func, args, kwargs, inputs):
        """An operator whose output shape depends on values: answered where the values are known."""
        gathers = func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
        if inputs and not gathers and all(value_of(t) is not None for t in inputs):
            with real_mode():
                value = func(*_real(args), **_real(kwargs))
            values = value if isinstance(value, tuple) else (value,)
            out = tuple(torch.empty(v.shape, dtype=v.dtype, device="cpu") for v in values)
            for tensor, twin in zip(out, values):
                set_value(tensor, twin)
            return out if isinstance(value, tuple) else out[0]
        if gathers:
            flat: list[Any] = []
            for index in map(_positions, args[1]):
                flat.extend(index if isinstance(index, tuple) else (index,))
            args = (args[0], flat, *args[2:])
        return func(*args, **kwargs)


def _positions(index):
    """The integer indices for a boolean one whose values are known."""
    if index is None or index.dtype not in (torch.bool, torch.uint8):
        return index
    value = value_of(index)
    if value is None:
        return index
    with real_mode():
        found = value.nonzero(as_tuple=True)
    return tuple(torch.empty(f.shape, dtype=f.dtype, device="cpu") for f in found)


def _grouped_mm(one, other, offs=None, bias=None, out_dtype=None):
    """The products of experts; torch's own fake kernel refuses all types but bfloat16, its CPU kernel does not."""
    if one.dtype == torch.bfloat16:
        return aten._grouped_mm.default(one, other, offs, bias, out_dtype)
    groups = {2: () if offs is None else (offs.shape[0],), 3: (one.shape[0],)}
    batch = groups[one.dim()] if one.dim() == other.dim() else ()
    return torch.empty((*batch, one.shape[-2], other.shape[-1]), dtype=out_dtype or one.dtype, device=one.device)


_BETWEEN = (__name__, "torch._dynamo.eval_frame", "torch._compile")


def _from_engine() -> bool:
    """Whether the operator comes from the autograd engine and not from a Python backward."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") in _BETWEEN:
        frame = frame.f_back
    return frame is None or frame.f_globals.get("__name__", "").startswith("torch.autograd")


def _tensors(args, kwargs) -> list[torch.Tensor]:
    found = []
    for item in args:
        if isinstance(item, torch.Tensor):
            found.append(item)
        elif isinstance(item, (list, tuple)):
            found.extend(t for t in item if isinstance(t, torch.Tensor))
    for item in kwargs.values():
        if isinstance(item, torch.Tensor):
            found.append(item)
        elif isinstance(item, (list, tuple)):
            found.extend(t for t in item if isinstance(t, torch.Tensor))
    return found


def _outputs(out) -> list[torch.Tensor]:
    if isinstance(out, torch.Tensor):
        return [out]
    if isinstance(out, (list, tuple)):
        found = []
        for item in out:
            if isinstance(item, torch.Tensor):
                found.append(item)
            elif isinstance(item, (list, tuple)):
                found.extend(t for t in item if isinstance(t, torch.Tensor))
        return found
    return []


def _real(item):
    if isinstance(item, torch.Tensor):
        value = value_of(item)
        return item if value is None else value
    if isinstance(item, (list, tuple)):
        return type(item)(_real(i) for i in item)
    if isinstance(item, dict):
        return {key: _real(value) for key, value in item.items()}
    return item


def _plain(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors with storage inside a tensor (a wrapper subclass has several)."""
    if hasattr(tensor, "__tensor_flatten__") and type(tensor).__name__ != "FakeTensor":
        names, _ = tensor.__tensor_flatten__()
        return [part for name in names for part in _plain(getattr(tensor, name))]
    if tensor.layout != torch.strided:
        return []
    return [tensor]
