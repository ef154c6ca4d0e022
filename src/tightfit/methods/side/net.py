"""The small network beside a stack: blocks of the stack's own class at a fraction of its widths."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tightfit.core import hfmodel
from tightfit.core.edits import is_planning
from tightfit.core.errors import UnsupportedModelError
from tightfit.core.new_modules import like, own_random
from tightfit.methods.side.places import HEADS, INNER, STATES, Place, head_dim
from tightfit.methods.side.rows import Choice, choose, cut, cut_norm, evenly, groups_of, magnitude
from tightfit.methods.side.taps import tap


def small_config(config: Any, reduction: int, dropout: float) -> Any:
    """The config at a fraction of the widths, with next to no vocabulary and one rate for all dropout."""
    small = copy.deepcopy(config)
    for name, value in list(vars(small).items()):
        if name in (*STATES, *INNER, *HEADS) and isinstance(value, int | float) and not isinstance(value, bool):
            setattr(small, name, type(value)(value // reduction))
        elif ("drop" in name) and isinstance(value, float):
            setattr(small, name, dropout)
    small.vocab_size = 8
    if getattr(small, "pad_token_id", None) is not None:
        small.pad_token_id = 0
    return small


def small_backbone(model: nn.Module, reduction: int, dropout: float) -> nn.Module:
    """A backbone of the model's class at a fraction of its widths, on the CPU, or without values while planning.

    Raises:
        UnsupportedModelError: its class cannot be built so.
    """
    base: Any = hfmodel.backbone(model)[1]
    config = small_config(base.config, reduction, dropout)
    try:
        with torch.device("meta") if is_planning() else contextlib.nullcontext():
            return type(base)(config)
    except (ValueError, TypeError, RuntimeError, AssertionError, AttributeError) as error:
        raise UnsupportedModelError(
            f"LadderSide(reduction={reduction}): no {type(base).__name__} of these widths can be built: {error}"
        ) from error


@dataclasses.dataclass(frozen=True)
class Design:
    """Everything that decides what a side net is.

    Attributes:
        reduction, kept, projection, rank, merge, temperature, dropout, init, seed: fields of `LadderSide`.
        choice: channels that were chosen from data, or None.
    """

    reduction: int
    kept: tuple[int, ...] | None
    projection: str
    rank: int
    merge: str
    temperature: float
    dropout: float
    init: str
    seed: int
    choice: tuple | None = None

    def rungs(self, place: Place) -> tuple[int, ...]:
        """Indices of the blocks that get a side block."""
        return self.kept if self.kept is not None else tuple(range(len(place.blocks)))


class SideNet(nn.Module):
    """The side net of one stack.

    Attributes:
        gates: one number for each block of the stack; sigmoid(gate / T) is the share of the side state.
        together: neighbouring channels of a head that turn together, see `turning`.
    """

    channels: Tensor | None
    norm: nn.Module
    together: int = 1

    def __init__(self, design: Design, rungs: Sequence[int], place: Place, like: Tensor):
        super().__init__()
        width, side = place.width, place.width // design.reduction
        self.rungs, self.width, self.side_width = tuple(rungs), width, side
        self.merge, self.temperature = design.merge if place.final else "pass", design.temperature
        self.gates = nn.Parameter(torch.zeros(len(place.blocks)))
        self.register_buffer("channels", torch.arange(side) if design.projection == "frozen_linear" else None)
        self.first = tap(design, width, side)
        for rung in self.rungs:
            self.add_module(f"tap_{rung}", tap(design, width, side))
        if place.final:
            self.up = nn.Linear(side, width)
            if design.merge == "residual":
                nn.init.zeros_(self.up.weight)
                nn.init.zeros_(self.up.bias)
            if design.merge == "alpha":
                self.share = nn.Parameter(torch.ones(1))
        self.to(like.dtype)

    def start(self, hidden: Tensor) -> Tensor:
        """The side state below the first block; (batch, tokens, width) -> (batch, tokens, width / r)."""
        return self._tapped(self.first, hidden)

    def mixed(self, state: Tensor, hidden: Tensor, rung: int) -> Tensor:
        """What the side block of a rung reads: the gated sum of the side state and the block's output."""
        return self.gated(state, self.tapped(hidden, rung), rung)

    def tapped(self, hidden: Tensor, rung: int) -> Tensor:
        """A block's output at the side net's width."""
        return self._tapped(getattr(self, f"tap_{rung}"), hidden)

    def gated(self, state: Tensor, tapped: Tensor, rung: int) -> Tensor:
        """The gated sum of the side state and a block's output at the side net's width."""
        return tapped + torch.sigmoid(self.gates[rung] / self.temperature) * (state - tapped)

    def _tapped(self, projection: Any, hidden: Tensor) -> Tensor:
        if self.channels is not None:
            return hidden.index_select(-1, self.channels).to(self.gates.dtype)
        return projection(hidden.to(self.gates.dtype))

    def block(self, rung: int) -> Any:
        """The side block of a rung."""
        return getattr(self, f"block_{rung}")

    def merged(self, state: Tensor, hidden: Tensor) -> Tensor:
        """What the stack gives: (batch, tokens, width)."""
        if self.merge == "pass":
            return hidden
        lifted = self.up(self.norm(state)).to(hidden.dtype)
        if self.merge == "side":
            return lifted
        if self.merge == "alpha":
            share = self.share.to(hidden.dtype)
            return share * hidden + (1 - share) * lifted
        return hidden + lifted


def build(model: nn.Module, all_places: Sequence[Place], design: Design) -> list[SideNet]:
    """The side nets of all stacks of a model, on its device."""
    kind = like(model)
    meta = is_planning() or kind.is_meta
    with own_random(design.seed):
        small = small_backbone(model, design.reduction, design.dropout)
        with torch.device("meta") if meta else contextlib.nullcontext():
            nets = [SideNet(design, design.rungs(place), place, kind) for place in all_places]
    together = max(turning(model), 1)
    for place, net in zip(all_places, nets):
        _fill(model, small, place, net)
        net.together = together
        net.to(kind.dtype)
    if not meta:
        _initialise(model, all_places, nets, design)
        nets = [net.to(kind.device) for net in nets]
    return nets


def _fill(model: nn.Module, small: nn.Module, place: Place, net: SideNet) -> None:
    """Move the blocks and the final norm of the small backbone into the side net."""
    prefix = hfmodel.backbone(model)[0]
    stock = [model.get_submodule(name) for name in place.blocks]
    blocks = [small.get_submodule(_below(prefix, name)) for name in place.blocks]
    # T5 has its table of relative positions in the first block only, and the first side block needs one
    head = net.rungs[0]
    extra = {name for name, _ in stock[0].named_parameters()} - {name for name, _ in stock[head].named_parameters()}
    for position, rung in enumerate(net.rungs):
        source = 0 if position == 0 and extra else rung
        _check_shapes(model, place.blocks[source], stock[source], blocks[source], net)
        for module in blocks[source].modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                vars(module)["layer_idx"] = (
                    len(place.blocks) + position
                )  # its entries in the model's KV cache come behind
        net.add_module(f"block_{rung}", blocks[source])
    if place.norm is None:
        device = net.gates.device
        net.norm = nn.LayerNorm(net.side_width, device=device)
    else:
        net.norm = small.get_submodule(_below(prefix, place.norm))


def _below(prefix: str, name: str) -> str:
    return name.removeprefix(f"{prefix}.") if prefix else name


def _check_shapes(model: nn.Module, name: str, block: nn.Module, side: nn.Module, net: SideNet) -> None:
    stock = {key.replace("base_layer.", ""): p for key, p in block.named_parameters()}
    reduction = net.width // net.side_width
    for key, parameter in side.named_parameters():
        full = stock.get(key)
        packed = full is not None and not full.is_floating_point()
        fits = full is not None and full.dim() == parameter.dim()
        if not packed and (
            not fits or any(s not in (f, f // reduction) for s, f in zip(parameter.shape, full.shape))  # type: ignore[union-attr]
        ):
            raise UnsupportedModelError(
                f"LadderSide(reduction={reduction}): {name}.{key} of {type(model).__name__} is "
                f"{tuple(full.shape) if full is not None else 'absent'}, and would be {tuple(parameter.shape)} in a "
                f"model of these widths; blocks of this kind are not supported"
            )


def _initialise(model: nn.Module, all_places: Sequence[Place], nets: Sequence[SideNet], design: Design) -> None:
    inner = head_dim(hfmodel.text_config(model))
    chosen = chosen_channels(model, all_places, design, inner)
    picks = iter(chosen.groups if chosen is not None else ())
    for place, net in zip(all_places, nets):
        if design.init == "random":
            _channels(net, evenly(net.width, design.reduction))
            continue
        assert chosen is not None
        _channels(net, chosen.states)
        for rung in net.rungs:
            block = model.get_submodule(place.blocks[rung])
            groups = groups_of(block, net.width, inner)
            cut(net.block(rung), block, groups, chosen.states, next(picks))
        if net.rungs[0] != 0:
            _cut_extra(net, model.get_submodule(place.blocks[0]))
        if place.norm is not None:
            cut_norm(net.norm, model.get_submodule(place.norm), chosen.states)


def _cut_extra(net: SideNet, first: nn.Module) -> None:
    """Values that only the stack's first block has (relative positions) go to the first side block."""
    stock = dict(first.named_parameters())
    with torch.no_grad():
        for name, parameter in net.block(net.rungs[0]).named_parameters():
            if "relative" in name and name in stock and stock[name].shape == parameter.shape:
                parameter.copy_(stock[name].detach().cpu())


def chosen_channels(model: nn.Module, all_places: Sequence[Place], design: Design, inner: int) -> Choice | None:
    """The channels that the side nets take over; None where they start at random."""
    if design.init == "random":
        return None
    if design.choice is not None:
        states, *rest = design.choice
        return Choice(states, tuple(rest))
    blocks = kept_blocks(model, all_places, design)
    scores = magnitude(blocks)
    return choose(blocks, all_places[0].width, inner, design.reduction, scores, rotary=turning(model))


def kept_blocks(model: nn.Module, all_places: Sequence[Place], design: Design) -> list[nn.Module]:
    """The blocks that get a side block, stack by stack."""
    return [model.get_submodule(place.blocks[i]) for place in all_places for i in design.rungs(place)]


def turning(model: nn.Module) -> int:
    """How many neighbouring channels of a head turn together by position; 0 where heads do not turn.

    1 where the channels of a pair stand half a head apart, as nearly everywhere; 2 where they are neighbours in the
    tables that the blocks are called with (Cohere).
    """
    text = hfmodel.text_config(model)
    if getattr(text, "rope_parameters", None) is None and not hasattr(text, "rope_theta"):
        return 0
    tables = (_table(module) for module in hfmodel.backbone(model)[1].modules())
    return 2 if any(table is not None and _in_pairs(table) for table in tables) else 1


def _table(module: Any) -> Tensor | None:
    """What a module gives for turning by one position; None where it is not for that."""
    frequencies = getattr(module, "inv_freq", None)
    if not torch.is_tensor(frequencies) or not hfmodel.has_values(frequencies):
        return None
    device = frequencies.device
    # whatever a foreign forward raises here, it is not the form looked for
    try:
        with torch.no_grad():
            found = module(torch.zeros(1, 1, 1, device=device), torch.ones(1, 1, dtype=torch.long, device=device))
    except Exception:
        return None
    return found[0] if isinstance(found, tuple) and torch.is_tensor(found[0]) else None


def _in_pairs(table: Tensor) -> bool:
    if table.shape[-1] % 2:
        return False
    pairs, halves = table.unflatten(-1, (-1, 2)), table.chunk(2, -1)
    return torch.equal(pairs[..., 0], pairs[..., 1]) and not torch.equal(*halves)


def _channels(net: SideNet, states: Sequence[int]) -> None:
    index = torch.tensor(states)
    with torch.no_grad():
        if net.channels is not None:
            net.channels.copy_(index)
        for module in net.modules():
            if isinstance(module, nn.Linear) and getattr(module, "is_tap", False):
                module.weight.zero_()[torch.arange(len(states)), index] = 1.0
