"""What `tightfit` offers, loaded by the first use of a name of it."""

from tightfit.core.apply import Applied, apply
from tightfit.core.artifacts import load
from tightfit.core.errors import (
    ArtifactError,
    BudgetError,
    ConflictError,
    DataError,
    RecipeError,
    SelectorError,
    SimulationError,
    StateError,
    TightfitError,
    TrainingError,
    UnknownTokenError,
    UnsupportedModelError,
)
from tightfit.core.memory import Measurement, interleave, measure
from tightfit.core.plan import Plan, plan
from tightfit.core.reach import largest_batch, longest_sequence
from tightfit.core.recipe import Recipe, chain
from tightfit.core.recommend import Choice, recommend
from tightfit.core.skeleton import skeleton
from tightfit.core.transform import Slot, Transform
from tightfit.methods import (
    Checkpointing,
    FusedOps,
    LadderSide,
    LearnableMemory,
    Lora,
    Losa,
    Mesa,
    PartialEmbedding,
    RecurrentMemory,
    Reversible,
    Sherl,
    SparseAdapter,
    TokenTune,
    TokenTuringMachine,
    Velora,
    WtaCrs,
    methods,
)

__all__ = [
    "Applied",
    "ArtifactError",
    "BudgetError",
    "Checkpointing",
    "Choice",
    "ConflictError",
    "DataError",
    "FusedOps",
    "LadderSide",
    "LearnableMemory",
    "Lora",
    "Losa",
    "Measurement",
    "Mesa",
    "PartialEmbedding",
    "Plan",
    "Recipe",
    "RecipeError",
    "RecurrentMemory",
    "Reversible",
    "SelectorError",
    "Sherl",
    "SimulationError",
    "Slot",
    "SparseAdapter",
    "StateError",
    "TightfitError",
    "TokenTune",
    "TokenTuringMachine",
    "TrainingError",
    "Transform",
    "UnknownTokenError",
    "UnsupportedModelError",
    "Velora",
    "WtaCrs",
    "apply",
    "chain",
    "interleave",
    "largest_batch",
    "load",
    "longest_sequence",
    "measure",
    "methods",
    "plan",
    "recommend",
    "skeleton",
]
