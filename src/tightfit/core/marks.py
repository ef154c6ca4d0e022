"""Marks on a module that its operators look at: by which codecs it keeps tensors or estimates a gradient."""

from __future__ import annotations

from typing import Any

from tightfit.core.tight import is_tight, state_of
from tightfit.ops.codec import Codec


class Coded:
    """Marks a module that keeps what it must keep in a codec's code."""


class Estimated:
    """Marks a linear layer whose weight gradient a codec estimates."""


def codec_of(module: Any) -> Codec | None:
    """The codec of a module's kept tensors; on a marked linear layer the estimator, over that codec. None in eval."""
    if not module.training:
        return None
    stored = state_of(module, Coded)["codec"] if is_tight(module, Coded) else None
    if not is_tight(module, Estimated):
        return stored
    estimator = state_of(module, Estimated)["codec"]
    estimator.inner = stored
    return estimator
