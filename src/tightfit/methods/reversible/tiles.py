"""A block run as two halves, the second one on some of the tokens after the others.

Behind its attention a block keeps tokens apart. So in backward the graph of its MLP half can be made, used and dropped
for one tile of the tokens after the other, at no further run of anything: it is there for one tile at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from tightfit.core.errors import StateError
from tightfit.core.hfmodel import has_values, is_hooked, storage_key
from tightfit.core.marks import Estimated
from tightfit.core.recording import notes_apart
from tightfit.core.stack import first_tensor
from tightfit.core.tight import is_tight
from tightfit.methods.reversible.replay import Part
from tightfit.methods.reversible.seam import Seam, cut_of
from tightfit.ops.autograd import inner_gradients, saved_apart
from tightfit.ops.replay import Replay

LEAST = 512
"""Tokens of the smallest tile; products of fewer rows are slower."""


def tile_count(most: int, block: nn.Module, hidden: Tensor, parameters: Sequence[Tensor], kwargs: dict) -> int:
    """Into how many tiles the tokens of a call go; 1: the block runs whole.

    It does so where it has no cut, where gradients of its parameters, which every tile adds to, are larger than the
    states, and where somebody looks at a layer's whole input or output, or a layer at more than its token.
    """
    tokens = hidden[..., 0].numel()
    count = min(most, tokens // LEAST)
    if count < 2 or not torch.is_grad_enabled() or cut_of(block) is None or kwargs.get("output_attentions"):
        return 1
    if sum(p.numel() for p in parameters) > hidden.numel():
        return 1
    inner = [module for module in block.modules() if module is not block]
    return 1 if any(map(_looks_further, inner)) else count


def _looks_further(module: nn.Module) -> bool:
    return is_hooked(module) or "droppath" in type(module).__name__.lower() or is_tight(module, Estimated)


class Tiled(Part):
    """A block's call, as its attention half and its MLP half on tiles of the tokens."""

    def __init__(self, seam: Seam, count: int, forward, block: nn.Module, args: tuple, kwargs: dict, parameters):
        super().__init__(forward, block, args, kwargs, parameters)
        self.seam, self.count, self.whole = seam, count, False

    def __call__(self, x: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, Any]:
        states = self._half(1, x, tensors) if has_values(x) else self._tried(x, tensors)
        self.whole = states is None
        if states is None:
            return super().__call__(x, tensors)
        found = [self._finish(tile, tensors) for tile in self._tiles(states)]
        return torch.cat([value for value, _ in found], dim=1).view_as(x), found[-1][1]

    def _half(self, number: int, x: Tensor, tensors: Sequence[Tensor]) -> Any:
        args, kwargs = self.arguments(tensors)
        with notes_apart():
            return self.seam.run(number, self.function, x, args, kwargs)

    def _tried(self, x: Tensor, tensors: Sequence[Tensor]) -> Tensor | None:
        """The same in a simulation, for which nobody has seen whether the block has halves; None: it has not."""
        with contextlib.suppress(StateError):
            states = self._half(1, x, tensors)
            if storage_key(states) != storage_key(x):  # else the MLP stands beside the attention
                return states
        return None

    def _finish(self, tile: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, Any]:
        out = self._half(2, tile, tensors)
        rest = None if torch.is_tensor(out) else tuple(out[1:])
        if rest and any(map(torch.is_tensor, rest)):
            raise StateError(
                "Reversible: a block returns more than its states, which cannot be had of its tokens apart; use tiles=1"
            )
        return first_tensor(out, "Reversible"), None if rest is None else (rest, {})

    def _tiles(self, states: Tensor) -> tuple[Tensor, ...]:
        """(1, n, width) each."""
        return states.reshape(1, -1, states.shape[-1]).tensor_split(self.count, dim=1)

    def backward(
        self, replay: Replay, x: Tensor, given: Sequence[Tensor], needs: Sequence[bool], grad: Tensor
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The output again, and the gradients of (x, parameters, given) where they are needed."""
        inputs = [x, *self.parameters, *given]
        found: list[Tensor | None] = [None] * len(inputs)
        wanted = [i for i, need in enumerate(needs) if need]

        def add(root: Any, grad: Tensor, *first: Tensor) -> Tensor | None:
            grads = inner_gradients([root], [*first, *(inputs[i] for i in wanted)], [grad])
            for i, one in zip(wanted, grads[len(first) :]):
                before = found[i]
                if one is not None:
                    found[i] = one if before is None else before + one
            return grads[0] if first else None

        with replay.again(), torch.enable_grad(), saved_apart():
            states = self._half(1, x, given)
            following = Replay(x.device.type, random=bool(replay.random), module=self.module)
        held, depends = states.detach(), states.requires_grad
        root = get_gradient_edge(states) if depends else None
        del states
        out, back = None, held.new_zeros(held.shape) if depends else None
        for number, (tile, sent) in enumerate(zip(self._tiles(held), self._tiles(grad))):
            leaf = tile.detach().requires_grad_(depends)
            with following.again(), torch.enable_grad(), saved_apart():
                value, _ = self._finish(leaf, given)
                following.go_on()
            # of the values' type, which need not be that of the states under autocast
            out = value.new_empty(x.shape) if out is None else out
            self._tiles(out)[number].copy_(value.detach())
            if value.requires_grad:
                edge, sent = get_gradient_edge(value), sent.to(value.dtype)
                del value
                first = add(edge, sent, *([leaf] if depends else []))
                if back is not None and first is not None:
                    self._tiles(back)[number].copy_(first)
        assert out is not None
        if root is not None and back is not None:
            del held
            add(root, back)
        return out, found
