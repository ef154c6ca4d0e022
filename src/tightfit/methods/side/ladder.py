"""LadderSide: a small network beside a frozen one, and no gradient through the large one (LST, arXiv 2206.06522)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tightfit.core import hfmodel
from tightfit.core.calls import evaluating
from tightfit.core.edits import Edit, Part
from tightfit.core.errors import UnsupportedModelError
from tightfit.core.fields import check_bool, check_choice, check_float, check_int, keep_tuples
from tightfit.core.transform import Context, Slot, Transform
from tightfit.methods.side.cache import FeatureCache
from tightfit.methods.side.frozen import (
    FrozenStackEdit,
    Link,
    OneRun,
    frozen_edits,
    inside,
    link_edits,
    side_edit,
)
from tightfit.methods.side.net import Design, SideNet, build, kept_blocks, turning
from tightfit.methods.side.places import (
    Place,
    check_layers,
    check_range,
    check_reduction,
    head_dim,
    places,
)
from tightfit.methods.side.rows import choose, fisher
from tightfit.methods.side.runner import METHOD, LadderRunner
from tightfit.methods.side.taps import PROJECTIONS

MERGES = ("residual", "side", "alpha")
INITS = ("magnitude", "fisher", "random")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LadderSide(Transform):
    """Train a narrow copy of the stack that reads the frozen blocks' outputs; the stack itself runs without a graph.

    Backward goes through the side net alone, which is `reduction` times narrower: about 1/r of the activations, no
    gradient and no optimizer state of the model's own weights, and no backward pass through them. Costs the stock
    forward and a small network's step. Nothing of the model is adapted, so it can learn less than `Lora` can.

    Fields:
        reduction: the side net's widths are the model's divided by this; it must divide the width of the states, of
            the MLP and of a head.
        keep_layers: indices of the blocks that get a side block, in every stack; None: all.
        projection: how a block's output comes down to the side net. "frozen_linear": the chosen channels; "pool": means
            of neighbours; "linear" (published), "lowrank": trained, and keep the full output of each of these blocks.
        rank: inner width of "lowrank".
        merge: "residual": the output is the stock one plus the side net's, which begins at zero, so training starts
            at the stock model; "side" (published): the side net's alone; "alpha": a trained share of each.
        init: channels and weights of the side blocks from the model: "magnitude": the largest; "fisher": the most
            important on data, see `fit`; "random": new weights.
        temperature: a gate is sigmoid(number / temperature); it begins at 1/2.
        dropout: one rate for all dropout inside the side net.
        backbone_dropout: leave dropout of the frozen model on while training, as published.
        cache_bytes: keep what the frozen model makes of every training example on disk, up to so many bytes, and do not
            run it again for an example that was seen; for data that comes back unchanged each epoch. One stack only,
            and a projection that does not train.
        seed: of new weights.
        channels: what `fit` chose.

    Raises:
        TypeError, ValueError: a field out of range; a reduction or layers that the model does not have (when planned or
            applied); a parameter of the backbone that was set to train (in a step).
        UnsupportedModelError: several stacks that do not make an encoder-decoder, or blocks that cannot be had in other
            widths (when applied).

    Example:
        >>> import tightfit
        >>> tightfit.chain(tightfit.LadderSide(reduction=4), tightfit.FusedOps())
        chain(LadderSide(reduction=4), FusedOps())

    Source: Ladder Side-Tuning, arXiv 2206.06522, sections 3.1 and 3.2; "alpha" and "lowrank" from QST, arXiv
    2401.07004. Deviations: "residual", "frozen_linear" and the evaluation mode of the backbone are additions; one set
    of channels for the states of all blocks instead of one for each matrix; the model's final norm stays behind the
    merged output.
    """

    reduction: int = 8
    keep_layers: tuple[int, ...] | None = None
    projection: str = "frozen_linear"
    rank: int = 16
    merge: str = "residual"
    init: str = "magnitude"
    temperature: float = 0.1
    dropout: float = 0.0
    backbone_dropout: bool = False
    cache_bytes: int | None = None
    seed: int = 0
    channels: tuple | None = None

    name: ClassVar[str] = "ladder-side"
    paper: ClassVar[str] = "2206.06522"
    touches: ClassVar[frozenset[Slot]] = frozenset({Slot.TRAINABLE, Slot.NEW_PARAMETERS, Slot.BLOCKS})
    reversible: ClassVar[bool] = True
    summary: ClassVar[str] = "a narrow network beside the frozen one; no backward pass through the model"

    def __post_init__(self) -> None:
        check_int(self, "reduction", 1)
        check_layers(self, "keep_layers")
        check_choice(self, "projection", PROJECTIONS)
        check_int(self, "rank", 1)
        check_choice(self, "merge", MERGES)
        check_choice(self, "init", INITS)
        check_float(self, "temperature", 0, open_low=True)
        check_float(self, "dropout", 0, 1, open_high=True)
        check_bool(self, "backbone_dropout")
        check_int(self, "seed", 0)
        check_int(self, "cache_bytes", 1, optional=True)
        if self.cache_bytes is not None and (self.backbone_dropout or self.projection in ("linear", "lowrank")):
            why = "backbone_dropout=True" if self.backbone_dropout else f"projection={self.projection!r}"
            raise ValueError(
                f"LadderSide(cache_bytes={self.cache_bytes}, {why}): what is kept must stay the same from epoch to "
                f"epoch; use backbone_dropout=False and projection 'frozen_linear' or 'pool'"
            )
        keep_tuples(self, "channels")
        _check_channels(self.channels)
        if self.channels is not None and self.init != "fisher":
            raise ValueError(f"LadderSide(channels=..., init={self.init!r}): channels are what init='fisher' chose")

    def unfilled(self) -> str | None:
        if self.init == "fisher" and self.channels is None:
            return (
                "init='fisher' needs data: use LadderSide.fit(model, batches), which returns a value with its channels "
                "filled in, or init='magnitude', which needs none"
            )
        return None

    @classmethod
    def fit(
        cls, model: nn.Module, batches: Iterable[Mapping[str, Any]], *, samples: int = 1024, **fields: Any
    ) -> LadderSide:
        """A value whose side net takes over the channels with the largest Fisher information on data.

        Every example goes through the model alone; the model is left as it was. Takes the memory of a stock step of
        batch 1.

        Args:
            model: the stock model.
            batches: dicts of tensors with labels, as the model is called.
            samples: examples that are used, at most.
            **fields: fields of the value.

        Raises:
            ValueError: no batches, batches without labels, or a quantised model (use init="magnitude" there).

        Example:
            >>> import torch, tightfit
            >>> from transformers import BertConfig, BertForSequenceClassification
            >>> sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
            >>> batch = {"input_ids": torch.ones(2, 8, dtype=torch.long), "labels": torch.tensor([0, 1])}
            >>> model = BertForSequenceClassification(BertConfig(**sizes))
            >>> value = tightfit.LadderSide.fit(model, [batch], reduction=4)
            >>> value.init, len(value.channels[0])
            ('fisher', 4)
        """
        value = cls(init="magnitude", **fields)
        check_reduction(METHOD, model, value.reduction)
        here = value._places(model)
        packed = [n for n, p in model.named_parameters() if not p.is_floating_point()]
        if packed:
            raise ValueError(
                f"LadderSide.fit: {packed[0]} is quantised, and has no gradient to measure; use "
                f"LadderSide(init='magnitude')"
            )
        blocks = kept_blocks(model, here, value._design())
        with evaluating(model.modules()):
            scores = fisher(model, blocks, _examples(batches, samples), _loss)
        inner = head_dim(hfmodel.text_config(model))
        chosen = choose(blocks, here[0].width, inner, value.reduction, scores, rotary=turning(model))
        return dataclasses.replace(value, init="fisher", channels=(chosen.states, *chosen.groups))

    def is_exact(self) -> bool:
        return False

    def freezes(self, model: nn.Module) -> Iterator[str]:
        return hfmodel.body_parameters(model)

    def edits(self, model: nn.Module, context: Context) -> Iterator[Edit]:
        here = self._places(model)
        check_reduction(METHOD, model, self.reduction)
        if self.cache_bytes is not None and len(here) > 1:
            raise UnsupportedModelError(
                f"LadderSide(cache_bytes={self.cache_bytes}): {type(model).__name__} has an encoder and a decoder; "
                f"only models of one stack can keep their features"
            )
        cache = None if self.cache_bytes is None else FeatureCache(self.cache_bytes)
        runners: list[OneRun] = []
        yield from frozen_edits(model, METHOD, dropout=self.backbone_dropout, runners=runners, cache=cache)
        built = Builder(self._design(), here)
        part = Ladder(here, cache)
        link = Link() if len(here) > 1 else None
        for place in here:
            yield side_edit(
                place,
                METHOD,
                functools.partial(built.make, place, model),
                f"{len(built.design.rungs(place))} blocks of width {place.width // self.reduction}",
            )
            yield FrozenStackEdit(
                blocks=place.blocks,
                inside=inside(model, place.blocks),
                runners=runners,
                runner=functools.partial(_runner, place, link, cache),
                part=part,
                note=f"{self.projection}, {self.merge}",
            )
        if link is not None:
            yield from link_edits(METHOD, link, here[0])

    def _design(self) -> Design:
        return Design(
            reduction=self.reduction,
            kept=self.keep_layers,
            projection=self.projection,
            rank=self.rank,
            merge=self.merge,
            temperature=self.temperature,
            dropout=self.dropout,
            init=self.init,
            seed=self.seed,
            choice=self.channels,
        )

    def _places(self, model: nn.Module) -> list[Place]:
        here = places(model, METHOD)
        check_range(self, "keep_layers", self.keep_layers, min(len(place.blocks) for place in here), model)
        return here


def _runner(place: Place, link: Link | None, cache: FeatureCache | None) -> LadderRunner:
    return LadderRunner(place.side, link, not place.final, cache)


class Builder:
    """Makes the side nets of all stacks when the first one is wanted."""

    def __init__(self, design: Design, here: list[Place]):
        self.design, self.places = design, here

    def make(self, place: Place, model: nn.Module, owner: nn.Module) -> SideNet:
        """The side net of one stack."""
        if place is self.places[0]:
            for other, net in zip(self.places, build(model, self.places, self.design)):
                other.side = net
        return place.side


class Ladder(Part):
    """The living side of `LadderSide`."""

    def __init__(self, here: list[Place], cache: FeatureCache | None):
        self.places, self.cache = here, cache

    def host_bytes(self) -> int:
        return 0 if self.cache is None else self.cache.bytes

    def report(self) -> dict[str, Any]:
        nets = [place.side for place in self.places]
        kept = (
            {} if self.cache is None else {"cached_examples": len(self.cache.slots), "cached_bytes": self.cache.bytes}
        )
        return kept | {
            "side_parameters": sum(p.numel() for net in nets for p in net.parameters()),
            "side_width": nets[0].side_width,
            "kept_layers": [list(net.rungs) for net in nets],
            "shares_of_the_side_state": [[round(share, 4) for share in _shares(net)] for net in nets],
        }


def _shares(net: SideNet) -> list[float]:
    gates = net.gates.detach()
    return [] if gates.is_meta else torch.sigmoid(gates / net.temperature)[list(net.rungs)].tolist()


# -- fields -----------------------------------------------------------------------------------------------------------


def _check_channels(value: Any) -> None:
    if value is None:
        return
    flat = list(_leaves(value))
    if not isinstance(value, tuple) or not flat or any(isinstance(i, bool) or not isinstance(i, int) for i in flat):
        raise TypeError("LadderSide(channels=...): accepted is what LadderSide.fit filled in, or None")


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


# -- data of `fit` ----------------------------------------------------------------------------------------------------


def _examples(batches: Iterable[Mapping[str, Any]], samples: int) -> Iterator[Mapping[str, Any]]:
    if isinstance(batches, Mapping):
        raise ValueError("LadderSide.fit: got one batch, accepted is an iterable of batches; give [batch]")
    found = 0
    for batch in batches:
        if "labels" not in batch:
            raise ValueError(
                f"LadderSide.fit: a batch holds {', '.join(batch)} and no labels; give labels, or use "
                f"LadderSide(init='magnitude'), which needs no data"
            )
        size = len(batch["labels"])
        for row in range(size):
            if found == samples:
                return
            found += 1
            yield {
                key: value[row : row + 1] if torch.is_tensor(value) and value.dim() and len(value) == size else value
                for key, value in batch.items()
            }
    if not found:
        raise ValueError("LadderSide.fit: there are no examples; use LadderSide(init='magnitude'), which needs none")


def _loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    extra = {"use_cache": False} if hfmodel.has_lm_head(model) else {}
    loss = getattr(model(**batch, **extra), "loss", None)
    if loss is None:
        raise UnsupportedModelError(f"LadderSide.fit: {type(model).__name__} returns no loss for these batches")
    return loss
