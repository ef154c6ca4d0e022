"""Where side methods stand in a model: its stacks, their widths, and what new modules are like."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

from torch import nn

from tightfit.core import hfmodel
from tightfit.core.errors import UnsupportedModelError, shorten
from tightfit.core.fields import keep_tuples

STATES = ("hidden_size", "d_model", "n_embd", "dim", "embed_dim")
INNER = ("intermediate_size", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner", "hidden_dim")
HEADS = ("head_dim", "d_kv", "query_pre_attn_scalar")
"""Names that configs use for widths."""


@dataclasses.dataclass
class Place:
    """A stack as the side methods see it.

    Attributes:
        owner: name of the module that runs the stack; side nets are its children.
        blocks: names of the blocks.
        width: of the states.
        final: the model's output comes from this stack; False for the encoder of an encoder-decoder.
        norm: name of the stack's final norm, or None.
        side: the module that was added, once it is there.
    """

    owner: str
    blocks: tuple[str, ...]
    width: int
    final: bool
    norm: str | None
    side: Any = None


def places(model: nn.Module, method: str) -> list[Place]:
    """The stacks of a model: one, or an encoder's and a decoder's.

    Raises:
        UnsupportedModelError: the model has none, or several that do not make an encoder-decoder.
    """
    stacks = hfmodel.stacks(model)
    paired = len(stacks) == 2 and getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if len(stacks) != 1 and not paired:
        found = ", ".join(stack[0].rsplit(".", 1)[0] for stack in stacks) or "none"
        raise UnsupportedModelError(
            f"{method}: needs a model of one stack of blocks, or an encoder and a decoder; {type(model).__name__} has "
            f"{len(stacks)} ({found})"
        )
    out = []
    for number, stack in enumerate(stacks):
        norm, width = final_norm(model, stack[0])
        owner = stack[0].rsplit(".", 2)[0] if stack[0].count(".") > 1 else ""
        out.append(Place(owner, tuple(stack), width, number == len(stacks) - 1, norm))
    return out


def final_norm(model: nn.Module, block: str) -> tuple[str | None, int]:
    """(name of the norm behind the stack or None, width of the states)."""
    width = _width(model, block)
    for name, norm in hfmodel.norms_behind(model, block):
        if {tuple(p.shape) for p in norm.parameters(recurse=False)} == {(width,)}:
            return name, width
    return None, width


def _width(model: nn.Module, block: str) -> int:
    found = getattr(hfmodel.text_config(model), "hidden_size", None)
    if not isinstance(found, int):
        raise UnsupportedModelError(
            f"{type(model).__name__}: its config names no hidden_size, so the width of {block} is not known"
        )
    return found


def head_dim(config: Any) -> int:
    """Channels of one attention head.

    Raises:
        UnsupportedModelError: there are no heads, or those of the layers differ.
    """
    try:
        found = getattr(config, "head_dim", None)
        return found if isinstance(found, int) else config.hidden_size // config.num_attention_heads
    except (AttributeError, ValueError, RuntimeError) as error:  # of another kind where layers differ (Gemma 4)
        raise UnsupportedModelError(
            f"LadderSide: {type(config).__name__} names no one width of attention heads ({error}); use Sherl or Losa"
        ) from error


def widths(config: Any) -> dict[str, int]:
    """The widths that shrink, by their names in the config."""
    own = {name: value for name, value in vars(config).items() if name in (*STATES, *INNER, *HEADS[:2])}
    found = {name: value for name, value in own.items() if isinstance(value, int)}
    if hasattr(config, "num_attention_heads") and not any(name in found for name in HEADS):
        found["head_dim"] = head_dim(config)
    return found


def check_reduction(method: str, model: nn.Module, reduction: int) -> None:
    """Raises: ValueError listing the divisors, where `reduction` does not divide every width."""
    check_divides(method, model, reduction, widths(hfmodel.text_config(model)))


def check_divides(method: str, model: nn.Module, reduction: int, found: dict[str, int]) -> None:
    """The same for the given widths."""
    common = math.gcd(*found.values())
    if common % reduction:
        allowed = [r for r in range(1, common + 1) if common % r == 0]
        given = ", ".join(f"{name}={value}" for name, value in found.items())
        raise ValueError(
            f"{method}(reduction={reduction}): does not divide {given} of this {type(model).__name__}; accepted is one "
            f"of {shorten(allowed, 20)}"
        )


# -- fields ------------------------------------------------------------------------------------------------------------


def check_layers(transform: Any, field: str, *, pair: bool = False) -> None:
    """Raise TypeError / ValueError unless the field is None or an ascending tuple of indices, or a pair of such."""
    keep_tuples(transform, field)
    value = getattr(transform, field)
    if value is None:
        return
    where = f"{type(transform).__name__}({field}=...)"
    rows = value if pair and isinstance(value, tuple) and value and isinstance(value[0], tuple) else (value,)
    for row in rows:
        if not isinstance(row, tuple) or any(isinstance(i, bool) or not isinstance(i, int) for i in row):
            raise TypeError(f"{where}: got {value!r}, accepted is a tuple of indices of blocks, or None")
        if not row or row[0] < 0 or any(a >= b for a, b in itertools.pairwise(row)) or len(rows) > 2:
            raise ValueError(
                f"{where}: got {value!r}, accepted are indices from 0 on, at least one, in ascending order"
            )


def check_range(transform: Any, field: str, value: tuple[int, ...] | None, blocks: int, model: nn.Module) -> None:
    """Raise ValueError where an index is beyond the model's blocks."""
    if value is not None and value[-1] >= blocks:
        raise ValueError(
            f"{type(transform).__name__}({field}={value}): {type(model).__name__} has {blocks} blocks, accepted are "
            f"indices up to {blocks - 1}"
        )
