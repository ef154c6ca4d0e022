"""In-place subclassing: give one module instance another forward without renaming, wrapping or patching.

`tighten(module, Mixin, state)` swaps the instance's class for `type(name, (Mixin, stock), {})`. Parameter
names, `isinstance`, `deepcopy`, hooks and sharding survive; several mixins stack through the MRO and can be
taken off in any order. The stock class name stays on modules with children, because transformers, accelerate
and the Trainer look such classes up by name; leaves get a `Tight` prefix.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from tightfit.core.errors import StateError

_STOCK = "_tight_stock"
_LAYERS = "_tight_layers"
_types: dict[tuple, type] = {}
_made: set[type] = set()


def tighten(module: nn.Module, mixin: type, state: dict[str, Any] | None = None) -> None:
    """Put `mixin` on top of the module's class; the mixin reads its `state` with `state_of(self, mixin)`.

    Raises:
        StateError: the mixin is on the module already, or an instance attribute shadows `forward`, so that
            a class-level edit would silently never run.

    Example:
        >>> import torch
        >>> class Loud:
        ...     def forward(self, x):
        ...         return state_of(self, Loud)["gain"] * super().forward(x)
        >>> layer = torch.nn.Linear(2, 2)
        >>> tighten(layer, Loud, {"gain": 2.0})
        >>> type(layer).__name__, isinstance(layer, torch.nn.Linear)
        ('TightLinear', True)
        >>> loosen(layer, Loud)
        >>> type(layer) is torch.nn.Linear
        True
    """
    layers = module.__dict__.get(_LAYERS, {})
    if mixin in layers:
        raise StateError(f"{type(module).__name__}: {mixin.__name__} is already on this module; remove it first")
    if "forward" in module.__dict__ and hasattr(mixin, "forward"):
        raise StateError(
            f"{type(module).__name__}: `forward` is set on the instance (device_map hooks, Accelerator.prepare or "
            f"a fused trainer head do that), so {mixin.__name__} would never be called; apply the recipe first"
        )
    stock = module.__dict__.get(_STOCK, type(module))
    _swap(module, stock, {**layers, mixin: state if state is not None else {}})


def loosen(module: nn.Module, mixin: type) -> None:
    """Take `mixin` off again; the last one restores the stock class.

    Raises:
        StateError: the mixin is not on the module, or somebody replaced the module's class since.
    """
    layers = module.__dict__.get(_LAYERS, {})
    if mixin not in layers:
        raise StateError(f"{type(module).__name__}: {mixin.__name__} is not on this module")
    _swap(module, module.__dict__[_STOCK], {m: s for m, s in layers.items() if m is not mixin})


def state_of(module: nn.Module, mixin: type) -> dict[str, Any]:
    """The state that `tighten` stored for `mixin` on this module."""
    return module.__dict__[_LAYERS][mixin]


def states_of(module: nn.Module) -> list[dict[str, Any]]:
    """The states of all mixins on this module."""
    return list(module.__dict__.get(_LAYERS, {}).values())


def is_tight(module: nn.Module, mixin: type | None = None) -> bool:
    """Whether the module carries `mixin` (or, without one, any mixin)."""
    layers = module.__dict__.get(_LAYERS, {})
    return mixin in layers if mixin is not None else bool(layers)


def _swap(module: nn.Module, stock: type, layers: dict[type, dict]) -> None:
    current = type(module)
    worn = next((cls for cls in current.__mro__ if cls is stock or cls in _made), None)
    if worn is None:
        raise StateError(
            f"{current.__name__}: the class of this module was replaced after the recipe was applied "
            f"(it is no {stock.__name__} any more); undo that replacement first"
        )
    # decided once: a module may get or lose children while it is worn
    keep_name = _has_children(module) if worn is stock else worn.__name__ == stock.__name__
    target = _tight_type(stock, tuple(layers), keep_name)
    if current is worn:
        module.__class__ = target
    elif worn in current.__bases__:  # fully_shard or parametrize put its own class on top: rebuild it
        bases = tuple(target if base is worn else base for base in current.__bases__)
        name = current.__name__.replace(worn.__name__, target.__name__)
        # its own `forward`, where there is one, is transformers' checkpointing wrapper around the worn class's
        own = {key: value for key, value in vars(current).items() if key not in ("__dict__", "__weakref__", "forward")}
        module.__class__ = type(name, bases, own)
    else:
        raise StateError(
            f"{current.__name__}: another package subclassed this module after the recipe was applied "
            f"(over {worn.__name__}); undo that first"
        )
    if layers:
        module.__dict__[_STOCK] = stock
        module.__dict__[_LAYERS] = layers
    else:
        module.__dict__.pop(_STOCK, None)
        module.__dict__.pop(_LAYERS, None)


def _has_children(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def _tight_type(stock: type, mixins: tuple[type, ...], keep_name: bool) -> type:
    if not mixins:
        return stock
    key = (stock, mixins, keep_name)
    if key not in _types:
        namespace: dict[str, Any] = {"__module__": stock.__module__, "__new__": _builds_stock(stock)}
        if any(hasattr(mixin, "forward") for mixin in mixins):
            namespace["forward"] = _with_signature(stock, mixins, key)
        name = stock.__name__ if keep_name else f"Tight{stock.__name__}"
        _types[key] = type(name, (*reversed(mixins), stock), namespace)
        _made.add(_types[key])
    return _types[key]


def _builds_stock(stock: type):
    """`type(model).from_pretrained(...)` and `type(model)(config)` must give a stock model, not a stateless edit."""

    def __new__(cls, *args, **kwargs):
        # deepcopy makes its empty instance without arguments
        return stock(*args, **kwargs) if args or kwargs else object.__new__(cls)

    return __new__


def _with_signature(stock: type, mixins: tuple[type, ...], key: tuple):
    outermost: Any = next(mixin for mixin in reversed(mixins) if hasattr(mixin, "forward"))

    # the Trainer reads label names and dataset columns from this signature
    @functools.wraps(stock.forward)  # type: ignore[attr-defined]
    def forward(self, *args, **kwargs):
        if not isinstance(self, _types[key]):
            # accelerate's autocast wrapper, made while the recipe was applied, outlives it on the instance
            return type(self).forward(self, *args, **kwargs)
        return outermost.forward(self, *args, **kwargs)

    return forward
