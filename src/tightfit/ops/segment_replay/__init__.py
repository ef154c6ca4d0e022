"""Steps that hand a state on: run without keeping anything but the states, and step by step again in backward."""

from tightfit.ops.segment_replay.torch import segment_replay

__all__ = ["segment_replay"]
