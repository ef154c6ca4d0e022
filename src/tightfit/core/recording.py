"""What transformers notes of inner modules while a model runs (router logits, attentions), by hooks on these."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

_STATES = "hidden_states"  # noted of whole blocks


def noted_kinds() -> tuple[str, ...]:
    """The kinds that the call under way notes inside of blocks; none outside of a call."""
    notes = _notes()
    return tuple(k for k, v in notes.items() if isinstance(v, list) and k != _STATES) if notes else ()


@contextlib.contextmanager
def notes_apart(kinds: Iterable[str] = ()) -> Iterator[dict[str, list[Any]]]:
    """What runs inside is not noted for the call under way; of these kinds it is noted in the dict that this gives."""
    apart: dict[str, list[Any]] = {kind: [] for kind in kinds}
    if not apart and _notes() is None:
        yield apart
        return
    collector = _collector()
    token = collector.set(apart or None)
    try:
        yield apart
    finally:
        collector.reset(token)


def note(found: Mapping[str, list[Any]]) -> None:
    """Add to what the call under way notes."""
    notes = _notes() or {}
    for kind, values in found.items():
        notes[kind].extend(values)


def _notes() -> dict[str, Any] | None:
    collector = _collector()
    return None if collector is None else collector.get()


def _collector() -> Any:
    try:
        from transformers.utils import output_capturing
    except ImportError:  # an older transformers, whose blocks return what is asked for
        return None
    return getattr(output_capturing, "_active_collector", None)
