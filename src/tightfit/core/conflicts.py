"""Conflicts, found from slots and places alone: no method is named anywhere in here."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable

from tightfit.core.edits import Edit
from tightfit.core.transform import Slot, Transform


@dataclasses.dataclass(frozen=True)
class Conflict:
    """Two transforms that claim the same place in the same slot."""

    first: str
    second: str
    slot: Slot | None
    places: tuple[str, ...]

    def __str__(self) -> str:
        if self.slot is None:
            return f"{self.first} appears twice in the recipe; keep one, with the fields you want"
        shown = ", ".join(self.places[:3]) + (f" and {len(self.places) - 3} more" if len(self.places) > 3 else "")
        return (
            f"{self.first} and {self.second} both take over {shown} (slot '{self.slot.label}'); "
            f"keep one of them, or give them different `where`"
        )


def find_conflicts(planned: list[tuple[Transform, Edit]], adapted: Iterable[str] = ()) -> list[Conflict]:
    """All conflicts among the edits of a recipe; a claim that nobody makes exclusively may be shared.

    Args:
        adapted: layers on which the model has adapters of the user's own.
    """
    claimants: dict[tuple[Slot, str], list[tuple[str, bool]]] = defaultdict(list)
    for layer in adapted:
        claimants[Slot.NEW_PARAMETERS, layer].append(("the model's own PEFT adapters", False))
    for transform, edit in planned:
        for claim in edit.claims():
            claimants[claim].append((type(transform).__name__, edit.exclusive))
    clashes: dict[tuple[str, str, Slot], list[str]] = defaultdict(list)
    for (slot, place), users in claimants.items():
        takers = {name for name, exclusive in users if exclusive}
        for first, second in {tuple(sorted((taker, name))) for taker in takers for name, _ in users if name != taker}:
            clashes[first, second, slot].append(place)
    found: list[Conflict] = []
    for (first, second, slot), places in sorted(clashes.items()):
        conflict = Conflict(first, second, slot, tuple(sorted(places, key=_in_model_order)))
        # one that takes over blocks takes their recomputation too: say it once
        if not any((c.first, c.second, c.places) == (first, second, conflict.places) for c in found):
            found.append(conflict)
    return found


def _in_model_order(place: str) -> list[tuple[int, str]]:
    return [(int(part) if part.isdigit() else -1, part) for part in place.split(".")]


def repeated(transforms: tuple[Transform, ...]) -> list[Conflict]:
    """One conflict per method that a recipe holds more than once."""
    names = [type(t).__name__ for t in transforms]
    return [Conflict(name, name, None, ()) for name in sorted(set(names)) if names.count(name) > 1]
