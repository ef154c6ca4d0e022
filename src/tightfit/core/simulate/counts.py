"""Counts of the work in a simulated step, for the time model, and facts about operators."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable

import torch

aten = torch.ops.aten
Call = tuple[int, str, str, tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]

_EXP = (
    "exp",
    "softmax",
    "gelu",
    "silu",
    "tanh",
    "sigmoid",
    "erf",
    "log",
    "sin",
    "cos",
    "pow",
    "scaled_dot_product",
)
_SMALL = 1 << 10
_NO_WORK = ("prim", "profiler")
_RANDOM = ("bernoulli", "native_dropout", "rand", "normal_", "uniform_", "exponential_", "multinomial")


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the tracker needs to know about an operator."""

    name: str
    view: bool
    random: bool
    draws: bool
    exponential: bool
    add: bool
    reads_value: bool
    uninitialised: bool
    writes: tuple[int, ...]
    dynamic: bool
    flops: Callable | None
    hides: Callable | None


@functools.cache
def facts(func) -> Facts:
    """Facts about an operator overload."""
    from tightfit.core.simulate import hidden

    name = func._schema.name.split("::")[-1]
    return Facts(
        name=str(func),
        view=_is_view(func),
        random=torch.Tag.nondeterministic_seeded in func.tags,
        draws=any(word in name for word in _RANDOM),
        exponential=any(word in name for word in _EXP),
        add=func is aten.add.Tensor,
        reads_value=name == "_local_scalar_dense",
        uninitialised="empty" in name,
        writes=tuple(i for i, a in enumerate(func._schema.arguments) if a.alias_info and a.alias_info.is_write),
        dynamic=torch.Tag.dynamic_output_shape in func.tags or name in ("index", "index_put", "index_put_"),
        flops=_flop_formula(func),
        hides=hidden.may_hide(func),
    )


def _is_view(func) -> bool:
    """Whether the outputs alias inputs without being written: no work, no memory."""
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _flop_formula(func) -> Callable | None:
    if func in (aten.mm.default, aten.bmm.default):
        return lambda args, kwargs, out: 2 * out.numel() * args[0].shape[-1]
    if func in (aten.addmm.default, aten.baddbmm.default):
        return lambda args, kwargs, out: 2 * out.numel() * args[1].shape[-1]
    from torch.utils.flop_counter import flop_registry

    formula = flop_registry.get(func._overloadpacket)
    if formula is None:
        return None
    return lambda args, kwargs, out: formula(*args, **kwargs, out_val=out)


@dataclasses.dataclass
class Counts:
    """Work of a step, per phase number: FLOPs, bytes in and out, elements of exp-like and random ops, operators.

    `calls` has what the time model prices: (phase number, operator, element type, shapes of the tensor inputs, shapes
    of the outputs) -> how often it runs. "/permuted" or "/transposed" after the operator says that its last input lies
    otherwise in memory than its output; the latter, that it is not read along its rows.
    """

    flops: dict[int, int] = dataclasses.field(default_factory=dict)
    bytes_moved: dict[int, int] = dataclasses.field(default_factory=dict)
    exponentials: dict[int, int] = dataclasses.field(default_factory=dict)
    draws: dict[int, int] = dataclasses.field(default_factory=dict)
    operators: dict[int, int] = dataclasses.field(default_factory=dict)
    calls: dict[Call, int] = dataclasses.field(default_factory=dict)

    def add(self, phase: int, func, facts: Facts, args, kwargs, inputs, outputs) -> None:
        """Count one operator that is not a view."""
        if func.namespace in _NO_WORK:
            return
        _plus(self.operators, phase, 1)
        moved = 0
        for tensor in inputs:
            moved += tensor.numel() * tensor.element_size()
        for tensor in outputs:
            moved += tensor.numel() * tensor.element_size()
        _plus(self.bytes_moved, phase, moved)
        call = (phase, facts.name + _layout(inputs, outputs), *_form(inputs, outputs))
        self.calls[call] = self.calls.get(call, 0) + 1
        if facts.flops is not None and outputs:
            # a formula may not know this signature: the operator is then counted by bytes alone
            with contextlib.suppress(Exception):
                _plus(self.flops, phase, facts.flops(args, kwargs, outputs[0]))
        if facts.exponential and outputs:
            elements = math.prod(outputs[0].shape)
            if "scaled_dot_product" in facts.name:
                elements = math.prod(inputs[0].shape[:-1]) * inputs[1].shape[-2]
            _plus(self.exponentials, phase, elements)
        if facts.draws and outputs:
            _plus(self.draws, phase, outputs[0].numel())


def _layout(inputs, outputs) -> str:
    """How an operator's input lies in memory where its output of the same shape lies otherwise."""
    if len(outputs) != 1 or not inputs:
        return ""
    source, made = inputs[-1], outputs[0]  # what copy_ reads is its last
    if source.shape != made.shape or source.stride() == made.stride() or source.numel() <= _SMALL:
        return ""
    return "/permuted" if source.stride()[-1] in (0, 1) else "/transposed"


def _form(inputs, outputs) -> tuple[str, tuple, tuple]:
    first = next((t for t in (*inputs, *outputs) if t.dtype.is_floating_point), None)
    dtype = "" if first is None else str(first.dtype)
    return dtype, tuple(tuple(t.shape) for t in inputs), tuple(tuple(t.shape) for t in outputs)


def _plus(table: dict[int, int], phase: int, amount: int) -> None:
    table[phase] = table.get(phase, 0) + amount
