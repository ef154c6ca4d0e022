"""The methods, one module each."""

import sys
import types

from tightfit.core.recipe import method_classes
from tightfit.core.transform import Transform
from tightfit.methods.checkpointing import Checkpointing
from tightfit.methods.fused_ops import FusedOps
from tightfit.methods.learnable_memory import LearnableMemory
from tightfit.methods.lora import Lora
from tightfit.methods.mesa import Mesa
from tightfit.methods.partial_embedding import PartialEmbedding
from tightfit.methods.recurrent_memory import RecurrentMemory
from tightfit.methods.reversible import Reversible
from tightfit.methods.side import LadderSide, Losa, Sherl
from tightfit.methods.sparse_adapter import SparseAdapter
from tightfit.methods.token_tune import TokenTune
from tightfit.methods.token_turing_machine import TokenTuringMachine
from tightfit.methods.velora import Velora
from tightfit.methods.wta_crs import WtaCrs

__all__ = [
    "Checkpointing",
    "FusedOps",
    "LadderSide",
    "LearnableMemory",
    "Lora",
    "Losa",
    "Mesa",
    "PartialEmbedding",
    "RecurrentMemory",
    "Reversible",
    "Sherl",
    "SparseAdapter",
    "TokenTune",
    "TokenTuringMachine",
    "Velora",
    "WtaCrs",
    "methods",
]


def methods() -> list[type[Transform]]:
    """The method classes of this library, each with its facts: name, paper, touches, exact, reversible.

    Example:
        >>> import tightfit
        >>> [m.name for m in tightfit.methods() if m.exact]
        ['checkpointing', 'fused-ops', 'partial-embedding']
    """
    return [cls for cls in method_classes().values() if cls.__module__.startswith("tightfit.methods")]


class _Methods(types.ModuleType):
    """This module: importing it puts it where `tightfit.methods()` is found, so it is that function too."""

    def __call__(self) -> list[type[Transform]]:
        return methods()


sys.modules[__name__].__class__ = _Methods
