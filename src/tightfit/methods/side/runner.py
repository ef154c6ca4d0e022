"""The runner of a stack with a ladder beside it, one tape for each forward."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tightfit.core.calls import refusing
from tightfit.core.errors import StateError, UnsupportedModelError
from tightfit.core.recording import notes_apart
from tightfit.core.stack import block_of, first_tensor
from tightfit.methods.side.cache import FeatureCache, Lookup
from tightfit.methods.side.frozen import Link, OneRun, Split, plain_call, with_first
from tightfit.methods.side.net import SideNet

METHOD = "LadderSide"


class Tape:
    """The side state of one forward, and what the blocks gave beside the states (T5's position tables)."""

    def __init__(self, state: Tensor, split: Split | None):
        self.state, self.split = state, split
        self.lookup: Lookup | None = None
        self.features: Tensor | None = None
        self.theirs: tuple = ()
        self.ours: tuple = ()
        self.opened = False


class LadderRunner(OneRun):
    """Runs the blocks without a graph; each rung's output goes to its side block at once and is not kept."""

    def __init__(self, side: SideNet, link: Link | None, encoder: bool, cache: FeatureCache | None = None):
        self.side, self.link, self.encoder, self.cache = side, link, encoder, cache
        self.ran = False

    def open(self, hidden: Any) -> Tape:
        self.begin(METHOD)
        split = None
        if self.link is not None and not self.encoder:
            split = Split(self.side.width, self.side.side_width, METHOD)
        tape = Tape(self.side.start(hidden.detach()), split)
        tape.lookup = self.cache.take() if self.cache is not None else None
        if tape.lookup is not None:
            tokens = hidden.shape[1]
            if tape.lookup.served:
                tape.features = tape.lookup.features(tokens, hidden.device)
            else:
                columns = len(self.side.rungs) * self.side.side_width + self.side.width
                tape.lookup.open(columns, tokens, self.side.gates.dtype)
        return tape

    def block(self, tape: Tape, index: int, last: bool, forward, hidden, args: tuple, kwargs: dict) -> Any:
        side = self.side
        if not tape.opened:
            tape.opened = True
            for cache in _caches((*args, *kwargs.values())):
                extend(cache, len(side.gates), side.rungs)
        out = hidden if tape.features is not None else self._run(tape, forward, hidden, args, kwargs)
        states = first_tensor(out, METHOD)
        if index in side.rungs:
            state = side.gated(tape.state, self._tapped(tape, states, index), index)
            block = side.block(index)
            _same_attention(block, block_of(forward))
            given = [self._ours(tape, value) for value in args]
            beside = {key: self._ours(tape, value) for key, value in kwargs.items()}
            with notes_apart(), contextlib.nullcontext() if self.ran else self._refusing(block):
                made = block(state, *given, **beside)
            tape.state, tape.ours = first_tensor(made, METHOD), () if torch.is_tensor(made) else tuple(made[1:])
        tape.theirs = () if torch.is_tensor(out) else tuple(out[1:])
        if last:
            if tape.features is not None:
                states = tape.features[..., -side.width :].to(hidden.dtype)
            elif tape.lookup is not None:
                tape.lookup.write(len(side.rungs) * side.side_width, states)
                tape.lookup.close()
            if self.encoder:
                assert self.link is not None
                self.link.given = side.norm(tape.state)
            self.ran = True
            return with_first(out, side.merged(tape.state, states))
        return out

    def _refusing(self, block: Any) -> contextlib.AbstractContextManager[None]:
        """What a side block raises when it first runs says that such a block cannot be a side block."""
        share = self.side.width // self.side.side_width
        return refusing(
            lambda error: (
                f"{METHOD}(reduction={share}): a {type(block).__name__} of 1/{share} of the widths does not run on "
                f"what the model's own is called with ({error}); use Sherl or Losa"
            )
        )

    def _run(self, tape: Tape, forward, hidden: Tensor, args: tuple, kwargs: dict) -> Any:
        plain, named = plain_call(tape.split, args, kwargs)
        with torch.no_grad():
            out = forward(hidden, *plain, **named)
        if tape.lookup is not None and not torch.is_tensor(out):
            raise UnsupportedModelError(
                f"{METHOD}(cache_bytes=...): a {type(block_of(forward)).__name__} gives more than its states, which "
                f"the cache does not keep; leave cache_bytes out"
            )
        return out

    def _tapped(self, tape: Tape, states: Tensor, rung: int) -> Tensor:
        place = self.side.rungs.index(rung) * self.side.side_width
        if tape.features is not None:
            return tape.features[..., place : place + self.side.side_width]
        tapped = self.side.tapped(states, rung)
        if tape.lookup is not None:
            tape.lookup.write(place, tapped)
        return tapped

    def _ours(self, tape: Tape, value: Any) -> Any:
        """The side block's form of what the stack's block is called with."""
        for number, theirs in enumerate(tape.theirs):
            if value is not None and value is theirs:
                return tape.ours[number] if tape.ours else None
        if tape.split is not None and (parts := tape.split(value)) is not None:
            return parts[1].to(self.side.gates.dtype)
        if isinstance(value, tuple) and value and all(torch.is_tensor(v) and v.is_floating_point() for v in value):
            # tables of a rotation: every r-th frequency is the table of heads of 1/r of the width
            step = self.side.width // self.side.side_width
            return tuple(_thinned(v, step, self.side.together).to(self.side.gates.dtype) for v in value)
        if torch.is_tensor(value) and value.dim() == 4 and value.is_floating_point():
            return value.to(self.side.gates.dtype)  # a mask that is added
        return value


def _thinned(table: Tensor, step: int, together: int) -> Tensor:
    """Every `step`-th run of `together` columns."""
    if together == 1:
        return table[..., ::step]
    return table.unflatten(-1, (-1, together))[..., ::step, :].flatten(-2)


def _same_attention(side: Any, block: Any) -> None:
    """Let the side block use the attention implementation that the model uses now."""
    ours, theirs = _config_of(side), _config_of(block)
    if ours is not None and theirs is not None and ours._attn_implementation != theirs._attn_implementation:
        ours._attn_implementation = theirs._attn_implementation


def _config_of(block: Any) -> Any:
    for module in block.modules():
        config = vars(module).get("config")
        if hasattr(config, "_attn_implementation"):
            return config
    return None


# -- caches -----------------------------------------------------------------------------------------------------------


def _caches(values) -> Iterator[Any]:
    """The caches of keys and values among these, those inside an encoder-decoder's too."""
    for value in values:
        if any(cls.__name__ == "EncoderDecoderCache" for cls in type(value).__mro__):
            yield from (value.self_attention_cache, value.cross_attention_cache)
        elif any(cls.__name__ == "Cache" for cls in type(value).__mro__):
            yield value


def extend(cache: Any, blocks: int, rungs: Sequence[int]) -> None:
    """Make room for the side blocks' keys and values behind the blocks' own, layers of the same kinds.

    There they follow the rest through beam search, cropping and resets.

    Raises:
        StateError: the cache was filled without the side net.
    """
    layers = cache.layers
    if len(layers) >= blocks + len(rungs):
        return
    if layers and cache.get_seq_length():
        raise StateError(
            f"{METHOD}: this {type(cache).__name__} was filled without the side net; start from an empty one"
        )
    if getattr(cache, "layer_class_to_replicate", None) is None:
        own = list(layers)
        while len(layers) < blocks + len(rungs):
            kind = rungs[len(layers) - blocks] if len(layers) >= blocks else 0
            layers.append(_empty(own[min(kind, len(own) - 1)]))


def _empty(layer: Any) -> Any:
    twin = copy.copy(layer)
    twin.keys = twin.values = None
    twin.is_initialized = False
    length = getattr(layer, "cumulative_length", None)
    if length is not None:
        twin.cumulative_length = torch.zeros_like(length) if torch.is_tensor(length) else 0
    return twin
