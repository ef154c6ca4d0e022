"""The two halves of a block, attention and MLP, cut where the states between them are; found as the block runs.

A block with norms in front (x + A(N x), then h + M(N h)): the first half stops at the MLP's first layer and returns
what went into the norm before it; the second half runs with an attention that gives zeros. A block with norms behind:
the first half stops behind the attention's norm, the second one starts there.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tightfit.core import hfmodel
from tightfit.core.edits import Edit, ModulesEdit
from tightfit.core.errors import StateError, UnsupportedModelError
from tightfit.core.tight import is_tight, loosen, state_of, tighten
from tightfit.core.transform import Slot
from tightfit.methods.reversible.adapters import Mlp

Layers = list[tuple[nn.Module, type, dict[str, Any]]]


class _Stop(Exception):
    """Carries the states between the halves out of a block."""

    def __init__(self, states: Tensor | None):
        super().__init__()
        self.states = states


class Seam:
    """Where a block is cut, and which half of it runs now (0: both)."""

    def __init__(self, post_norm: bool, inside: bool):
        self.post_norm, self.inside = post_norm, inside
        self.half = 0
        self.attended = self.reached = False
        self.norm: tuple[Tensor, Tensor] | None = None

    def run(self, half: int, forward, x: Tensor, args: tuple, kwargs: dict) -> Any:
        """What one half of the block gives."""
        self.half, self.attended, self.reached = half, False, False
        try:
            out = forward(x, *args, **kwargs)
        except _Stop as stop:
            if stop.states is not None:
                return stop.states.view_as(x)  # OPT flattens the states for its MLP
        finally:
            self.half, self.norm = 0, None
        if half != 2 or not self.reached:
            raise StateError(
                "Reversible: a block did not run through the places where it was cut into halves; use tiles=1, or "
                "another variant than 'meft3'"
            )
        return out

    def before_norm(self, x: Tensor) -> Tensor | None:
        """The states that the last norm made an MLP's input of; None: something else made it."""
        before, out = self.norm or (None, None)
        return before if out is not None and hfmodel.storage_key(out) == hfmodel.storage_key(x) else None


class SeamAttention:
    """An attention that only one half runs."""

    def forward(self, *args, **kwargs):
        seam = state_of(self, SeamAttention)["seam"]  # type: ignore[arg-type]
        if seam.half != 2:
            out = super().forward(*args, **kwargs)  # type: ignore[misc]
            if seam.half == 1 and seam.inside:
                raise _Stop(out if torch.is_tensor(out) else out[0])
            seam.attended = True
            return out
        hidden = args[0] if args else kwargs["hidden_states"]
        seam.attended = seam.reached = True
        return (hidden if seam.inside else torch.zeros_like(hidden)), None


class SeamNorm:
    """A norm beside which the cut may be."""

    def forward(self, x, *args, **kwargs):
        seam = state_of(self, SeamNorm)["seam"]  # type: ignore[arg-type]
        if seam.half == 2 and not seam.post_norm and not seam.attended:
            return x  # for the attention alone, which does not run
        at_cut = seam.half and seam.post_norm and not seam.inside and seam.attended
        if at_cut and seam.half == 2:
            seam.attended = False
            return x
        out = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        if at_cut:
            raise _Stop(out)
        seam.norm = (x, out) if seam.half == 1 else None
        return out


class SeamMlp:
    """The first layer of an MLP, before which the first half stops."""

    def forward(self, x, *args, **kwargs):
        seam = state_of(self, SeamMlp)["seam"]  # type: ignore[arg-type]
        if seam.half == 1:
            raise _Stop(seam.before_norm(x))
        return super().forward(x, *args, **kwargs)  # type: ignore[misc]


def layers_of(model: nn.Module, name: str, mlp: Mlp, post_norm: bool) -> Layers:
    """The modules of a block that know of its cut, with their mixins and states.

    Raises:
        UnsupportedModelError: the block has no attention, more than one, or one that adds what it reads itself.
    """
    block = model.get_submodule(name)
    attentions = [child for key, child in block.named_children() if _is_attention(key, child)]
    if len(attentions) != 1:
        raise UnsupportedModelError(
            f"Reversible(variant='meft3'): block {name} has {len(attentions)} attention modules, accepted is one; use "
            f"variant='meft1'"
        )
    if "residual" in inspect.signature(type(attentions[0]).forward).parameters:
        raise UnsupportedModelError(_no_halves(name))  # it adds the states itself (BLOOM)
    norms = [
        module
        for module in block.modules()
        if "norm" in type(module).__name__.lower()
        and (weight := module._parameters.get("weight")) is not None
        and tuple(weight.shape) == (mlp.width,)
    ]
    own = set(map(id, attentions[0].modules()))
    seam = Seam(post_norm, post_norm and any(id(norm) in own for norm in norms))
    found: Layers = [(attentions[0], SeamAttention, {"seam": seam})]
    found += [(norm, SeamNorm, {"seam": seam}) for norm in norms if id(norm) not in own]
    return [*found, (hfmodel.stock_module(model, f"{name}.{mlp.up}"), SeamMlp, {"seam": seam})]


def _is_attention(name: str, child: nn.Module) -> bool:
    kind = type(child).__name__.lower()
    return ("att" in name.lower() or "attention" in kind) and "norm" not in kind and bool(child._modules)


def cut_of(block: nn.Module) -> Seam | None:
    """The cut of a block, if it has one."""
    found = (state_of(child, SeamAttention)["seam"] for child in block.children() if is_tight(child, SeamAttention))
    return next(found, None)


def seam_edits(places: Mapping[str, Mlp], post_norm: bool) -> Iterator[Edit]:
    """Edits after which the halves of blocks can be run apart; none without blocks."""
    if not places:
        return
    cut: dict[str, Layers] = {}

    def find(mixin: type):
        def found(model: nn.Module):
            for name, mlp in places.items():
                if name not in cut:
                    cut[name] = layers_of(model, name, mlp, post_norm)
            return [(m, state) for layers in cut.values() for m, kind, state in layers if kind is mixin]

        return found

    for mixin, kind in ((SeamAttention, "attention"), (SeamNorm, "norm"), (SeamMlp, "MLP")):
        yield ModulesEdit(
            slot=Slot.BLOCKS, kind=f"cut at {kind}", mixin=mixin, find=find(mixin), note="halves of blocks"
        )


def check_cut(model: nn.Module, places: dict[str, Mlp], post_norm: bool, *, drop: bool):
    """A probe's check that the halves of a block, one after the other, are the block.

    Args:
        places: the blocks, with their MLPs.
        drop: take blocks of which that is not true to the bit, or whose second half mixes tokens, out of `places`.

    Raises (when called):
        UnsupportedModelError: without `drop`, they are not.
    """

    def check(name: str, block: nn.Module, hidden: Any, args: tuple, kwargs: dict, state: Any) -> None:
        if name not in places:
            return
        layers = layers_of(model, name, places[name], post_norm)
        modes = [(module, module.training) for module in block.modules()]
        block.eval()
        try:
            _compare(name, block, layers, hidden, args, kwargs, to_the_bit=drop)
        except UnsupportedModelError:
            if not drop:
                raise
            del places[name]
        finally:
            for module, mode in modes:
                module.training = mode

    return check


def _compare(
    name: str, block: nn.Module, layers: Layers, hidden: Any, args: tuple, kwargs: dict, *, to_the_bit: bool
) -> None:
    try:
        with _cut(layers) as seam:
            whole = _first(block.forward(hidden, *args, **kwargs))
            half = _first(seam.run(1, block.forward, hidden, args, kwargs))
            rest = seam.run(2, block.forward, half, args, kwargs)
            both = _first(rest)
            tiles = half.reshape(1, -1, half.shape[-1]).tensor_split(5, dim=1) if to_the_bit else ()
            parts = [_first(seam.run(2, block.forward, tile, args, kwargs)) for tile in tiles]
    except Exception as error:
        raise UnsupportedModelError(f"{_no_halves(name)} ({type(error).__name__}: {error})") from error
    apart = not torch.equal(half, hidden) and not torch.equal(half, whole)
    if to_the_bit:
        alone = torch.is_tensor(rest) or not any(map(torch.is_tensor, rest[1:]))
        same = torch.equal(both, whole) and alone and _rounded_alike(torch.cat(parts, 1).view_as(whole), whole, half)
    else:
        same = torch.allclose(both, whole, rtol=1e-2, atol=1e-3 * float(whole.abs().max()))
    if not (apart and same):
        raise UnsupportedModelError(_no_halves(name))


def _rounded_alike(found: Tensor, wanted: Tensor, half: Tensor) -> bool:
    """Whether sums of `half` and something else are the same but for how the something and the sums were rounded."""
    eps = torch.finfo(wanted.dtype).eps
    other = (wanted - half).float().square().mean().sqrt() * max(8 * eps, 64 * torch.finfo(torch.float32).eps)
    return bool(((found - wanted).abs() <= 4 * eps * (wanted.abs() + half.abs()) + other).all())


@contextlib.contextmanager
def _cut(layers: Layers) -> Iterator[Seam]:
    done: Layers = []
    try:
        for module, mixin, state in layers:
            tighten(module, mixin, state)
            done.append((module, mixin, state))
        yield layers[0][2]["seam"]
    finally:
        for module, mixin, _ in done:
            loosen(module, mixin)


def _first(out: Any) -> Tensor:
    return out if torch.is_tensor(out) else out[0]


def _no_halves(name: str) -> str:
    return (
        f"Reversible(variant='meft3'): block {name} is not its attention followed by its MLP, so it cannot be cut into "
        f"halves; use variant='meft1'"
    )
