"""Fine-tune the transformer you want in the memory you have."""

import importlib
from typing import TYPE_CHECKING, Any

from tightfit._version import __version__ as __version__

if TYPE_CHECKING:
    from tightfit import nn as nn
    from tightfit import presets as presets
    from tightfit._api import *  # noqa: F403

_MODULES = ("nn", "presets")


def __getattr__(name: str) -> Any:
    """A public name, on its first use: torch and transformers, which all of them need, take seconds to load."""
    if name in _MODULES:
        return importlib.import_module(f"tightfit.{name}")
    if name != "__all__" and name.startswith("_"):
        raise AttributeError(f"module 'tightfit' has no attribute '{name}'")
    api = importlib.import_module("tightfit._api")
    public = {key: getattr(api, key) for key in api.__all__}
    globals().update(public, __all__=sorted([*public, "__version__"]))
    if name not in globals():
        raise AttributeError(f"module 'tightfit' has no attribute '{name}'")
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, *__getattr__("__all__")})
