"""How the output of a block comes down to the width of a side net."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from tightfit.methods.side.net import Design

PROJECTIONS = ("frozen_linear", "linear", "lowrank", "pool")


class Pool(nn.Module):
    """The mean of neighbouring channels."""

    def __init__(self, side: int):
        super().__init__()
        self.side = side

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.unflatten(-1, (self.side, -1)).mean(-1)


def tap(design: Design, width: int, side: int) -> nn.Module:
    """A projection from the model's width to the side net's; trained ones keep what they read."""
    if design.projection == "linear":
        layer = nn.Linear(width, side)
        layer.is_tap = design.init != "random"  # type: ignore[assignment]
        nn.init.zeros_(layer.bias)
        return layer
    if design.projection == "lowrank":
        down, up = nn.Linear(width, design.rank, bias=False), nn.Linear(design.rank, side, bias=False)
        nn.init.normal_(down.weight, std=width**-0.5)
        nn.init.normal_(up.weight, std=design.rank**-0.5)
        return nn.Sequential(down, up)
    return Pool(side) if design.projection == "pool" else nn.Identity()
