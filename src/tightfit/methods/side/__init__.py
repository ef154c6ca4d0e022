"""Small networks beside a frozen model: no gradient goes through the model's own blocks."""

from tightfit.methods.side.ladder import Ladder, LadderSide
from tightfit.methods.side.losa import Losa
from tightfit.methods.side.sherl import Sherl

__all__ = ["Ladder", "LadderSide", "Losa", "Sherl"]
