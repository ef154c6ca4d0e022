"""Sherl: shallow outputs summed up into one state, which the last frozen block refines (arXiv 2407.07523)."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tightfit.core import hfmodel
from tightfit.core.edits import Edit, ModuleEdit, Part
from tightfit.core.errors import UnsupportedModelError
from tightfit.core.fields import check_bool, check_float, check_int
from tightfit.core.new_modules import fresh
from tightfit.core.stack import first_tensor
from tightfit.core.tight import state_of
from tightfit.core.transform import Context, Slot, Transform
from tightfit.methods.side.frozen import (
    FrozenStackEdit,
    Link,
    OneRun,
    Split,
    frozen_edits,
    inside,
    link_edits,
    plain_call,
    side_edit,
    untouched_edits,
    with_first,
)
from tightfit.methods.side.places import Place, check_divides, check_layers, places

METHOD = "Sherl"
SMALLEST = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sherl(Transform):
    """Train adapters on the outputs of frozen blocks; their sum goes through the last frozen blocks.

    The early blocks run without a graph. Each tapped output goes through a narrow adapter; what is redundant among
    them weighs less; the sum enters the last `late_layers` blocks, through which the gradient passes. Kept: the full
    output of every tapped block, the inside of the late blocks (the same for any depth), 1 / r of that for the
    adapters. Costs the stock forward, and a backward pass through the late blocks.

    Fields:
        reduction: the adapters' width is the model's divided by this.
        keep_layers: indices of the tapped blocks, all below the late ones; of an encoder-decoder a pair of them (the
            encoder has no late blocks). The input of the first block is tapped as well. None: all.
        late_layers: how many blocks at the end run with the sum; 0: it goes straight to the head.
        start: begin at the stock model: what enters the late blocks is the stock state plus a sum that begins at zero.
            False: as published, the stock state comes in through a gate that begins at zero.
        temperature: of that gate, tanh(number / temperature).
        backbone_dropout: leave dropout of the frozen model on while training.
        seed: of new weights.

    Raises:
        TypeError, ValueError: a field out of range; taps or late blocks that the model does not have, fewer than two
            taps below the deepest one (when planned or applied); a parameter of the backbone that was set to train (in
            a step).
        UnsupportedModelError: several stacks that do not make an encoder-decoder (when applied).

    Example:
        >>> import tightfit
        >>> tightfit.Sherl(late_layers=2)
        Sherl(late_layers=2)

    Source: SHERL, arXiv 2407.07523, section 3. Deviations: `start` is an addition. The encoder of an encoder-decoder
    has an aggregation of its own, which the late decoder blocks attend to; the early ones attend to the stock one's.
    """

    reduction: int = 8
    keep_layers: tuple | None = None
    late_layers: int = 1
    start: bool = True
    temperature: float = 0.1
    backbone_dropout: bool = False
    seed: int = 0

    name: ClassVar[str] = "sherl"
    paper: ClassVar[str] = "2407.07523"
    touches: ClassVar[frozenset[Slot]] = frozenset({Slot.TRAINABLE, Slot.NEW_PARAMETERS, Slot.BLOCKS})
    reversible: ClassVar[bool] = True
    summary: ClassVar[str] = "adapters on shallow outputs, refined by the last frozen block"

    def __post_init__(self) -> None:
        check_int(self, "reduction", 1)
        check_layers(self, "keep_layers", pair=True)
        check_int(self, "late_layers", 0)
        check_bool(self, "start")
        check_float(self, "temperature", 0, open_low=True)
        check_bool(self, "backbone_dropout")
        check_int(self, "seed", 0)

    def is_exact(self) -> bool:
        return False

    def freezes(self, model: nn.Module) -> Iterator[str]:
        return hfmodel.body_parameters(model)

    def edits(self, model: nn.Module, context: Context) -> Iterator[Edit]:
        here = places(model, METHOD)
        # only late blocks read what an encoder's taps give
        untouched, here = ([], here) if self.late_layers else (here[:-1], here[-1:])
        check_divides(METHOD, model, self.reduction, {"hidden_size": here[0].width})
        taps = [self._taps(model, place, here) for place in here]
        runners: list[OneRun] = []
        yield from frozen_edits(model, METHOD, dropout=self.backbone_dropout, runners=runners)
        yield from untouched_edits(model, untouched)
        link = Link() if len(here) > 1 else None
        part = Aggregation(here)
        for place, own in zip(here, taps):
            late = len(place.blocks) - (self.late_layers if place.final else 0)
            yield side_edit(
                place,
                METHOD,
                functools.partial(self._make, model, place, own),
                f"{len(own) + 1} taps",
            )
            yield FrozenStackEdit(
                blocks=place.blocks,
                inside=inside(model, place.blocks),
                runners=runners,
                runner=functools.partial(_runner, place, link, late),
                part=part,
                note=f"{len(place.blocks) - late} late blocks",
            )
            if place.final and place.norm is not None:
                yield ModuleEdit(
                    slot=Slot.BLOCKS,
                    module=place.norm,
                    mixin=OwnNorm,
                    state=functools.partial(_norm_state, place),
                    note="trained norm",
                )
        if link is not None:
            yield from link_edits(METHOD, link, here[0])

    def _taps(self, model: nn.Module, place: Place, here: list[Place]) -> tuple[int, ...]:
        """The tapped blocks of one stack."""
        late = len(place.blocks) - (self.late_layers if place.final else 0)
        found: Any = self.keep_layers
        if found is None:
            found = tuple(range(max(0, late)))
        elif isinstance(found[0], tuple):
            if len(here) == 1:
                raise ValueError(
                    f"Sherl(keep_layers={self.keep_layers}): a pair is for an encoder-decoder; {type(model).__name__} "
                    f"has one stack, give one tuple of indices"
                )
            found = found[here.index(place)]
        where = f"Sherl(keep_layers={self.keep_layers}, late_layers={self.late_layers})"
        if found and found[-1] >= late:
            raise ValueError(
                f"{where}: block {found[-1]} is a late one or beyond the last; {place.blocks[0].rsplit('.', 1)[0]} has "
                f"{len(place.blocks)} blocks, accepted are indices below {late}"
            )
        if len(found) < 2:
            raise ValueError(
                f"{where}: {len(found)} tapped blocks in {place.blocks[0].rsplit('.', 1)[0]} "
                f"({len(place.blocks)} blocks); the aggregation needs two taps below the deepest one, so at least two "
                f"blocks beside the first one's input"
            )
        return found

    def _make(self, model: nn.Module, place: Place, taps: tuple[int, ...], owner: nn.Module) -> nn.Module:
        def make() -> nn.Module:
            net = SherlNet(taps, place.width, place.width // self.reduction, self.start, self.temperature)
            if place.norm is not None:
                net.norm = copy.deepcopy(model.get_submodule(place.norm)).requires_grad_(True)
            return net

        place.side = fresh(model, self.seed, make)
        return place.side


class TapAdapter(nn.Module):
    """(W2 a + a) * sigmoid(W3 a) with a = relu(W1 x)."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.down, self.mix, self.gate = nn.Linear(width, inner), nn.Linear(inner, inner), nn.Linear(inner, inner)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.down(x))
        return (self.mix(a) + a) * torch.sigmoid(self.gate(a))


def redundancy(z: Tensor) -> Tensor:
    """How much each shallow tap says of what the shallow taps say, R; (batch, tokens, taps, width), guide left out."""
    unit = z / z.norm(dim=-1, keepdim=True).clamp_min(SMALLEST)
    return F.relu(unit @ unit.transpose(-1, -2)).sum(-1)


def weights(z: Tensor, scores: Tensor) -> Tensor:
    """Shares of the shallow taps: the scores over the redundancy, made to sum to 1; zero scores give zeros."""
    share = F.relu(scores) / redundancy(z).clamp_min(SMALLEST)
    return share / share.abs().sum(-1, keepdim=True).clamp_min(SMALLEST)


class SherlNet(nn.Module):
    """The adapters and the aggregation of one stack."""

    norm: Any

    def __init__(self, taps: tuple[int, ...], width: int, inner: int, start: bool, temperature: float):
        super().__init__()
        self.taps, self.width, self.start, self.temperature = taps, width, start, temperature
        self.tap_first = TapAdapter(width, inner)
        for index in taps:
            self.add_module(f"tap_{index}", TapAdapter(width, inner))
        self.score, self.out = nn.Linear(inner, 1), nn.Linear(inner, width)
        self.gate = nn.Parameter(torch.ones(1) if start else torch.zeros(1))
        if start:
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)
            nn.init.ones_(self.score.bias)  # every tap has a share to begin with: one without never gets a gradient
        self.register_module("norm", None)

    def tapped(self, index: int | None, hidden: Tensor) -> Tensor:
        """One output through its adapter; None: the first block's input."""
        adapter = getattr(self, "tap_first" if index is None else f"tap_{index}")
        return adapter(hidden.to(self.gate.dtype))

    def joined(self, found: list[Tensor], last: Tensor) -> Tensor:
        """What enters the late blocks, from the taps' outputs and the deepest early state."""
        *shallow, guide = found
        z = torch.stack(shallow, dim=-2)
        share = weights(z, self.score(z * guide.unsqueeze(-2)).squeeze(-1))
        total = torch.einsum("...m,...mw->...w", share, z) + guide
        gate = self.gate if self.start else torch.tanh(self.gate / self.temperature)
        return self.out(F.relu(total)).to(last.dtype) + gate.to(last.dtype) * last


class OwnNorm:
    """The model's final norm, with weights of its own."""

    def forward(self, hidden):
        return own_norm(state_of(self, OwnNorm)["net"], hidden)  # type: ignore[arg-type]


def _norm_state(place: Place, module: nn.Module) -> dict[str, Any]:
    return {"net": place.side}


def own_norm(net: SherlNet, hidden: Tensor) -> Tensor:
    """The trained norm where there is one."""
    return hidden if net.norm is None else net.norm(hidden.to(net.gate.dtype)).to(hidden.dtype)


class SherlTape:
    """The taps of one forward, at the adapters' width."""

    def __init__(self, first: Tensor, split: Split | None):
        self.found, self.split = [first], split


class SherlRunner(OneRun):
    """Runs the early blocks without a graph and the late ones, frozen too, with one."""

    def __init__(self, net: SherlNet, link: Link | None, late: int, encoder: bool):
        self.net, self.link, self.late, self.encoder = net, link, late, encoder

    def open(self, hidden: Any) -> SherlTape:
        self.begin(METHOD)
        if hidden.shape[-1] != self.net.width:
            raise UnsupportedModelError(
                f"{METHOD}: the blocks take states of shape {tuple(hidden.shape)}, whose last dimension is not the "
                f"width of {self.net.width}"
            )
        split = None
        if self.link is not None and not self.encoder:
            split = Split(self.net.width, self.net.width, METHOD)
        return SherlTape(self.net.tapped(None, hidden.detach()), split)

    def block(self, tape: SherlTape, index: int, last: bool, forward, hidden, args: tuple, kwargs: dict) -> Any:
        part = 0 if index < self.late else 1
        plain, named = plain_call(tape.split, args, kwargs, part)
        if index >= self.late:
            return forward(hidden, *plain, **named)
        with torch.no_grad():
            out = forward(hidden, *plain, **named)
        states = first_tensor(out, METHOD)
        if index in self.net.taps:
            tape.found.append(self.net.tapped(index, states))
        if index < self.late - 1:
            return out
        joined = self.net.joined(tape.found, states)
        if self.encoder:
            assert self.link is not None
            self.link.given = own_norm(self.net, joined)
            return out
        return with_first(out, joined)


def _runner(place: Place, link: Link | None, late: int) -> SherlRunner:
    return SherlRunner(place.side, link, late, encoder=not place.final)


class Aggregation(Part):
    """The living side of `Sherl`."""

    def __init__(self, here: list[Place]):
        self.places = here

    def report(self) -> dict[str, Any]:
        nets = [place.side for place in self.places]
        return {
            "side_parameters": sum(p.numel() for net in nets for p in net.parameters()),
            "tapped_layers": [list(net.taps) for net in nets],
        }
