"""A method as a small value: what it changes, stated as data, before anything is changed."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import torch

    from tightfit.core.edits import Edit


class Slot(enum.IntEnum):
    """Where in a training step an edit sits, from the innermost outwards; edits run in this order."""

    WEIGHTS = 0
    TRAINABLE = 1
    NEW_PARAMETERS = 2
    OPERATORS = 3
    BLOCKS = 4
    RECOMPUTE = 5
    SAVED_TENSORS = 6
    INPUTS = 7
    LOSS = 8
    OPTIMIZER = 9

    @property
    def label(self) -> str:
        return self.name.lower().replace("_", " ")


@dataclasses.dataclass(frozen=True)
class Context:
    """What a transform may know about the rest of its recipe while it describes its edits."""

    frozen: frozenset[str] = frozenset()

    def trains(self, model: torch.nn.Module, parameter: torch.nn.Parameter) -> bool:
        """Whether a stock parameter will train once the whole recipe is applied."""
        if not parameter.requires_grad:
            return False
        names = (name for name, p in model.named_parameters(remove_duplicate=False) if p is parameter)
        return not any(name in self.frozen for name in names)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transform:
    """Base of every method: a frozen, keyword-only value that describes its edits of a model.

    A subclass sets the five facts, validates its fields in `__post_init__`, and yields edits. It never
    changes the model itself: the core executes, journals, undoes and saves what `edits` yields.

    Facts:
        name: the method's short name, also its name on the command line.
        paper: arXiv id, or "" when there is none.
        touches: the slots its edits may use.
        exact: the gradients equal those of the untransformed step.
        reversible: it can be removed without loss.
        long_rows: rows may be longer than the model has positions.
    """

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    touches: ClassVar[frozenset[Slot]] = frozenset()
    exact: ClassVar[bool] = False
    reversible: ClassVar[bool] = False
    summary: ClassVar[str] = ""
    long_rows: ClassVar[bool] = False

    def edits(self, model: torch.nn.Module, context: Context) -> Iterable[Edit]:
        """Yield what to change, resolved on the untouched base model; must not change the model."""
        raise NotImplementedError(f"{type(self).__name__} describes no edits")

    def freezes(self, model: torch.nn.Module) -> Iterable[str]:
        """Names of the stock parameters that will not train under this transform."""
        return ()

    @classmethod
    def candidates(cls, model: torch.nn.Module) -> Iterable[Transform]:
        """Values worth trying on this model when a recipe is searched for, the one that gives up least first.

        A later value is tried only where an earlier one does not fit the budget. None by default.
        """
        return ()

    def is_exact(self) -> bool:
        """Whether this very value keeps the gradients exact; a field may give up what the class promises."""
        return self.exact

    def readable_ids(self) -> Sequence[int] | None:
        """The token ids that a row may hold, or None where it may hold any of the vocabulary."""
        return None

    def unfilled(self) -> str | None:
        """What must still be filled in before the value can be applied, or None when it is complete."""
        return None

    def to_dict(self) -> dict[str, Any]:
        """Fields that differ from their defaults, as JSON values."""
        out = {}
        for field in _recorded(self):
            value = getattr(self, field.name)
            if value != _default(field):
                out[field.name] = _plain(value)
        return out

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Transform:
        """Build the value from JSON values; the inverse of `to_dict`, so lists become tuples."""
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()})

    def __repr__(self) -> str:
        shown = ", ".join(
            f"{f.name}={getattr(self, f.name)!r}" for f in _recorded(self) if getattr(self, f.name) != _default(f)
        )
        return f"{type(self).__name__}({shown})"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # dataclass(repr=True) would write its own repr over ours, which leaves defaults out
        cls.__repr__ = Transform.__repr__  # type: ignore[method-assign]


def _recorded(transform: Transform) -> list[dataclasses.Field]:
    """The fields that make up the value; the others (a tokenizer for messages) are conveniences of this process."""
    return [field for field in dataclasses.fields(transform) if field.compare]


def _default(field: dataclasses.Field) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return dataclasses.MISSING


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"a value of type {type(value).__name__} cannot be written into a recipe: {value!r}")
