"""Small networks beside a frozen model: no gradient goes through the model's own blocks."""

from tightfit.methods.side.ladder import Ladder, LadderSide

__all__ = ["Ladder", "LadderSide"]
