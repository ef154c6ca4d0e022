"""Losa: low-rank mixers in parallel to a frozen model (arXiv 2402.02887)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tightfit.core import hfmodel
from tightfit.core.edits import Edit, Part
from tightfit.core.fields import check_bool, check_int
from tightfit.core.new_modules import fresh
from tightfit.core.stack import first_tensor
from tightfit.core.transform import Context, Slot, Transform
from tightfit.methods.side.frozen import (
    FrozenStackEdit,
    OneRun,
    frozen_edits,
    inside,
    side_edit,
    untouched_edits,
    with_first,
)
from tightfit.methods.side.places import Place, check_layers, check_range, places

METHOD = "Losa"
TOKEN_RANK = 16
SPREAD = 0.02


@dataclasses.dataclass(frozen=True, kw_only=True)
class Losa(Transform):
    """Train low-rank mixers of channels and tokens beside the frozen blocks; no gradient passes through the model.

    Every kept block's output, plus what the mixers below made of theirs, goes through a mixer; the sum of all is added
    to the model's last state. Saves the backward pass through the model, its gradients and optimizer state. Saves
    less memory than it may seem: a mixer keeps a few states of the full width.

    Fields:
        rank: inner width of the channel mixers.
        token_rank: inner width of the token mixers; 0: none; None: 16 where the model has a fixed number of tokens
            (images), else none.
        tokens: the number of tokens, where the model does not tell it.
        keep_layers: indices of the blocks that get a mixer; None: all. Of an encoder-decoder those of the decoder.
        published: start the side stream with the first block's input, and give it alone to the head; training then
            does not start at the stock model.
        backbone_dropout: leave dropout of the frozen model on while training.
        seed: of new weights.

    Raises:
        TypeError, ValueError: a field out of range; layers that the model does not have; token mixers in a causal model
            or without a fixed number of tokens (when planned or applied), another number of tokens, or a parameter of
            the backbone that was set to train (in a step).
        UnsupportedModelError: several stacks that do not make an encoder-decoder (when applied).

    Example:
        >>> import tightfit
        >>> tightfit.Losa(rank=8, token_rank=0)
        Losa(rank=8, token_rank=0)

    Source: LoSA, arXiv 2402.02887, section 3. Deviations: the stock model as the start; the forms of the two mixers are
    a reading of the paper's description.
    """

    rank: int = 16
    token_rank: int | None = None
    tokens: int | None = None
    keep_layers: tuple[int, ...] | None = None
    published: bool = False
    backbone_dropout: bool = False
    seed: int = 0

    name: ClassVar[str] = "losa"
    paper: ClassVar[str] = "2402.02887"
    touches: ClassVar[frozenset[Slot]] = frozenset({Slot.TRAINABLE, Slot.NEW_PARAMETERS, Slot.BLOCKS})
    reversible: ClassVar[bool] = True
    summary: ClassVar[str] = "low-rank mixers beside the frozen model; no backward pass through it"

    def __post_init__(self) -> None:
        check_int(self, "rank", 1)
        check_int(self, "token_rank", 0, optional=True)
        check_int(self, "tokens", 1, optional=True)
        check_layers(self, "keep_layers")
        check_bool(self, "published")
        check_bool(self, "backbone_dropout")
        check_int(self, "seed", 0)
        if self.tokens is not None and self.token_rank == 0:
            raise ValueError(f"Losa(tokens={self.tokens}, token_rank=0): without token mixers it has no meaning")

    def is_exact(self) -> bool:
        return False

    def freezes(self, model: nn.Module) -> Iterator[str]:
        return hfmodel.body_parameters(model)

    def edits(self, model: nn.Module, context: Context) -> Iterator[Edit]:
        here = places(model, METHOD)
        place = here[-1]
        check_range(self, "keep_layers", self.keep_layers, len(place.blocks), model)
        tokens, token_rank = self._token_mixing(model, place)
        runners: list[OneRun] = []
        yield from frozen_edits(model, METHOD, dropout=self.backbone_dropout, runners=runners)
        yield from untouched_edits(model, here[:-1])
        kept = self.keep_layers or tuple(range(len(place.blocks)))
        yield side_edit(
            place,
            METHOD,
            functools.partial(self._make, model, place, kept, tokens, token_rank),
            f"{len(kept)} mixers",
        )
        yield FrozenStackEdit(
            blocks=place.blocks,
            inside=inside(model, place.blocks),
            runners=runners,
            runner=functools.partial(_runner, place),
            part=Mixing(place),
            note=f"ranks {self.rank} and {token_rank}",
        )

    def _token_mixing(self, model: nn.Module, place: Place) -> tuple[int, int]:
        """(number of tokens, rank of the token mixers)."""
        causal = _is_causal(model, place)
        found = fixed_tokens(model) if self.tokens is None else self.tokens
        if self.token_rank is None and self.tokens is None:
            return (found, TOKEN_RANK) if found and not causal else (0, 0)
        wanted = TOKEN_RANK if self.token_rank is None else self.token_rank
        if not wanted:
            return 0, 0
        where = f"Losa(token_rank={self.token_rank}, tokens={self.tokens})"
        if causal:
            raise ValueError(
                f"{where}: {type(model).__name__} is causal, and token mixers would let a token see later ones; give "
                f"token_rank=0"
            )
        if not found:
            raise ValueError(
                f"{where}: {type(model).__name__} has no fixed number of tokens; give tokens=..., and pad every batch "
                f"to it, or token_rank=0"
            )
        return found, wanted

    def _make(
        self, model: nn.Module, place: Place, kept: tuple[int, ...], tokens: int, token_rank: int, owner: nn.Module
    ) -> nn.Module:
        place.side = fresh(
            model,
            self.seed,
            lambda: LosaNet(kept, place.width, self.rank, tokens, token_rank, self.published),
        )
        return place.side


def fixed_tokens(model: nn.Module) -> int:
    """The number of tokens that the model's images have; 0 for other models."""
    config: Any = getattr(model, "config", None)
    if not (hasattr(config, "image_size") and hasattr(config, "patch_size")):
        return 0
    for name, parameter in model.named_parameters():
        if "position_embedding" in name and parameter.dim() == 3:
            return parameter.shape[1] + (getattr(config, "num_register_tokens", None) or 0)  # they have no position
    return 0


def _is_causal(model: nn.Module, place: Place) -> bool:
    block = model.get_submodule(place.blocks[0])
    marked = any(
        getattr(module, "is_causal", False) or getattr(module, "is_decoder", False) for module in block.modules()
    )
    return marked or type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))


class LowRank(nn.Module):
    """U gelu(V x)."""

    def __init__(self, width: int, rank: int, *, zero: bool):
        super().__init__()
        self.down, self.up = nn.Linear(width, rank), nn.Linear(rank, width)
        nn.init.normal_(self.down.weight, std=SPREAD)
        nn.init.normal_(self.up.weight, std=0.0 if zero else SPREAD)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(F.gelu(self.down(x)))


class Mixer(nn.Module):
    """C(u + K(u)): C mixes channels, K mixes tokens; (batch, tokens, width)."""

    def __init__(self, width: int, rank: int, tokens: int, token_rank: int, *, zero: bool):
        super().__init__()
        self.norm, self.channels = nn.LayerNorm(width), LowRank(width, rank, zero=zero)
        self.tokens = tokens
        if token_rank:
            self.token_norm, self.over_tokens = nn.LayerNorm(width), LowRank(tokens, token_rank, zero=False)

    def forward(self, u: Tensor) -> Tensor:
        if self.tokens:
            if u.shape[1] != self.tokens:
                raise ValueError(
                    f"Losa: the token mixers are made for {self.tokens} tokens and got {u.shape[1]}; bring all inputs "
                    f"to that length, or give tokens={u.shape[1]} or token_rank=0"
                )
            u = u + self.over_tokens(self.token_norm(u).transpose(1, 2)).transpose(1, 2)
        return self.channels(self.norm(u))


class LosaNet(nn.Module):
    """The mixers of one stack."""

    def __init__(self, kept: tuple[int, ...], width: int, rank: int, tokens: int, token_rank: int, published: bool):
        super().__init__()
        self.kept, self.published = kept, published
        for index in kept:
            self.add_module(f"mixer_{index}", Mixer(width, rank, tokens, token_rank, zero=not published))

    def mixed(self, index: int, stream: Tensor | None, states: Tensor) -> Tensor:
        """The side stream after a block: y + Mix(b + y)."""
        states = states.to(self.dtype)
        made = getattr(self, f"mixer_{index}")(states if stream is None else states + stream)
        return made if stream is None else stream + made

    @property
    def dtype(self) -> torch.dtype:
        """Of the mixers."""
        return next(self.parameters()).dtype


class LosaRunner(OneRun):
    """Runs the blocks without a graph; the tape is the side stream."""

    def __init__(self, net: LosaNet):
        self.net = net

    def open(self, hidden: Any) -> list[Tensor | None]:
        self.begin(METHOD)
        return [hidden.detach().to(self.net.dtype) if self.net.published else None]

    def block(self, tape: list, index: int, last: bool, forward, hidden, args: tuple, kwargs: dict) -> Any:
        with torch.no_grad():
            out = forward(hidden, *args, **kwargs)
        states = first_tensor(out, METHOD)
        if index in self.net.kept:
            tape[0] = self.net.mixed(index, tape[0], states)
        if not last:
            return out
        stream = tape[0].to(states.dtype)
        return with_first(out, stream if self.net.published else states + stream)


def _runner(place: Place) -> LosaRunner:
    return LosaRunner(place.side)


class Mixing(Part):
    """The living side of `Losa`."""

    def __init__(self, place: Place):
        self.place = place

    def report(self) -> dict[str, Any]:
        net = self.place.side
        return {"side_parameters": sum(p.numel() for p in net.parameters()), "kept_layers": list(net.kept)}
