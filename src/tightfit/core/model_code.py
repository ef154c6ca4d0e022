"""What the code of a model's classes does that no attribute of theirs tells."""

from __future__ import annotations

import dis
import functools
import inspect
import types
from collections.abc import Iterable

from torch import nn

_NOT_THE_MODELS = ("builtins", "torch.", "peft.", "tightfit.", "transformers.modeling_", "transformers.generation.")


def asks_for_sdpa(modules: Iterable[nn.Module]) -> str | None:
    """The class among the modules' whose code asks whether the attention is named "sdpa", or None.

    Under another name such a module would compute something else: Falcon's leaves transformers' registry aside, that
    of DeepSeek V3.2 its sparse mask.
    """
    for cls in {type(module): None for module in modules}:
        found = next((part for part in cls.__mro__ if _names_sdpa(part)), None)
        if found is not None:
            return found.__name__
    return None


@functools.cache
def _names_sdpa(cls: type) -> bool:
    return any(_compares_with_sdpa(function.__code__) for function in _functions(cls))


def _compares_with_sdpa(code: types.CodeType) -> bool:
    inside = any(_compares_with_sdpa(constant) for constant in code.co_consts if isinstance(constant, types.CodeType))
    names = [name for constant in code.co_consts for name in (constant if isinstance(constant, tuple) else (constant,))]
    return inside or ("sdpa" in names and "_attn_implementation" in (*code.co_names, *names))


@functools.cache
def children_read(cls: type) -> frozenset[str]:
    """Names of children whose `weight` the code of a class itself reads, other than for its type or place."""
    found = set()
    for function in _functions(cls):
        steps = [i for i in dis.get_instructions(function.__code__) if i.opname != "EXTENDED_ARG"]
        for child, weight, then in zip(steps, steps[1:], steps[2:]):  # a return at least comes behind
            read = (child.opname, weight.opname, weight.argval) == ("LOAD_ATTR", "LOAD_ATTR", "weight")
            if read and not (then.opname == "LOAD_ATTR" and then.argval in ("dtype", "device", "shape")):
                found.add(child.argval)
    return frozenset(found)


def _functions(cls: type) -> list[types.FunctionType]:
    """What a class of a model's own defines, without decorators."""
    if cls.__module__.startswith(_NOT_THE_MODELS):
        return []
    members = (inspect.unwrap(getattr(value, "__func__", value)) for value in vars(cls).values() if callable(value))
    return [f for f in members if isinstance(f, types.FunctionType)]
