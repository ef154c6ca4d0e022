"""The two halves of a block, attention and MLP, cut where the states between them are; found as the block runs.

A block with norms in front (x + A(N x), then h + M(N h)): the first half stops at the MLP's first layer and returns
what went into the norm before it; the second half runs with an attention that gives zeros. A block with norms behind:
the first half stops behind the attention's norm, the second one starts there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tightfit.core import hfmodel
from tightfit.core.edits import Edit, ModulesEdit
from tightfit.core.errors import UnsupportedModelError
from tightfit.core.tight import is_tight, loosen, state_of, tighten
from tightfit.core.transform import Slot
from tightfit.methods.reversible.adapters import Mlp

Layers = list[tuple[nn.Module, type, dict[str, Any]]]


class _Stop(Exception):
    """Carries the states between the halves out of a block."""

    def __init__(self, states: Tensor):
        super().__init__()
        self.states = states


class Seam:
    """Where a block is cut, and which half of it runs now (0: both)."""

    def __init__(self, post_norm: bool, inside: bool):
        self.post_norm, self.inside = post_norm, inside
        self.half = 0
        self.attended = False
        self.before_norm: Tensor | None = None

    def run(self, half: int, forward, x: Tensor, args: tuple, kwargs: dict) -> Any:
        """What one half of the block gives."""
        self.half, self.attended = half, False
        try:
            return forward(x, *args, **kwargs)
        except _Stop as stop:
            return stop.states.view_as(x)  # OPT flattens the states for its MLP
        finally:
            self.half, self.before_norm = 0, None


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
        seam.attended = True
        return (hidden if seam.inside else torch.zeros_like(hidden)), None


class SeamNorm:
    """A norm beside which the cut may be."""

    def forward(self, x):
        seam = state_of(self, SeamNorm)["seam"]  # type: ignore[arg-type]
        at_cut = seam.half and seam.post_norm and not seam.inside and seam.attended
        if at_cut and seam.half == 2:
            seam.attended = False
            return x
        out = super().forward(x)  # type: ignore[misc]
        if at_cut:
            raise _Stop(out)
        seam.before_norm = x if seam.half == 1 else None
        return out


class SeamMlp:
    """The first layer of an MLP, before which the first half stops."""

    def forward(self, x):
        seam = state_of(self, SeamMlp)["seam"]  # type: ignore[arg-type]
        if seam.half == 1:
            raise _Stop(seam.before_norm)
        return super().forward(x)  # type: ignore[misc]


def layers_of(model: nn.Module, name: str, mlp: Mlp, post_norm: bool) -> Layers:
    """The modules of a block that know of its cut, with their mixins and states.

    Raises:
        UnsupportedModelError: the block has no attention, or more than one.
    """
    block = model.get_submodule(name)
    attentions = [child for key, child in block.named_children() if _is_attention(key, child)]
    if len(attentions) != 1:
        raise UnsupportedModelError(
            f"Reversible(variant='meft3'): block {name} has {len(attentions)} attention modules, accepted is one; use "
            f"variant='meft1'"
        )
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


def seam_of(block: nn.Module) -> Seam:
    """The cut of a block that has one."""
    return next(state_of(child, SeamAttention)["seam"] for child in block.children() if is_tight(child, SeamAttention))


def seam_edits(places: Sequence[tuple[str, Mlp]], post_norm: bool) -> Iterator[Edit]:
    """Edits after which the halves of blocks can be run apart."""
    cut: dict[str, Layers] = {}

    def find(mixin: type):
        def found(model: nn.Module):
            for name, mlp in places:
                if name not in cut:
                    cut[name] = layers_of(model, name, mlp, post_norm)
            return [(m, state) for layers in cut.values() for m, kind, state in layers if kind is mixin]

        return found

    for mixin, kind in ((SeamAttention, "attention"), (SeamNorm, "norm"), (SeamMlp, "MLP")):
        yield ModulesEdit(
            slot=Slot.BLOCKS, kind=f"cut at {kind}", mixin=mixin, find=find(mixin), note="halves of blocks"
        )


def check_cut(model: nn.Module, places: Sequence[tuple[str, Mlp]], post_norm: bool):
    """A probe's check that the halves of a block, one after the other, are the block.

    Raises (when called):
        UnsupportedModelError: they are not.
    """
    mlps = dict(places)

    def check(name: str, block: nn.Module, hidden: Any, args: tuple, kwargs: dict, state: Any) -> None:
        modes = [(module, module.training) for module in block.modules()]
        block.eval()
        try:
            with _cut(layers_of(model, name, mlps[name], post_norm)) as seam:
                whole = _first(block.forward(hidden, *args, **kwargs))
                half = _first(seam.run(1, block.forward, hidden, args, kwargs))
                both = _first(seam.run(2, block.forward, half, args, kwargs))
        except UnsupportedModelError:
            raise
        except Exception as error:
            raise UnsupportedModelError(f"{_no_halves(name)} ({type(error).__name__}: {error})") from error
        finally:
            for module, mode in modes:
                module.training = mode
        scale = float(whole.abs().max())
        apart = not torch.equal(half, hidden) and not torch.equal(half, whole)
        if not apart or not torch.allclose(both, whole, rtol=1e-2, atol=1e-3 * scale):
            raise UnsupportedModelError(_no_halves(name))

    return check


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
