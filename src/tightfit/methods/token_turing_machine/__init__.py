"""TokenTuringMachine: a head that reads an encoder's tokens as a stream, with a memory (arXiv 2211.09119)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, ClassVar

from torch import nn

from tightfit.core import hfmodel
from tightfit.core.edits import CallEdit, ChildEdit, ClaimEdit, Edit, TrainableEdit, inner_claims
from tightfit.core.errors import UnsupportedModelError
from tightfit.core.fields import check_bool, check_choice, check_float, check_int
from tightfit.core.new_modules import fresh
from tightfit.core.simulate.batches import task_of
from tightfit.core.transform import Context, Slot, Transform
from tightfit.methods.token_turing_machine.calls import STREAM, Noted, Reading, StreamHead, StreamModel
from tightfit.methods.token_turing_machine.stream import (
    SUMMARISERS,
    UNITS,
    WRITES,
    TokenTuringStream,
    check_heads,
)

__all__ = ["TokenTuringMachine", "TokenTuringStream"]

METHOD = "TokenTuringMachine"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenTuringMachine(Transform):
    """Classify by a small recurrent head that reads the encoder's tokens in segments, with a memory between them.

    Each step reads a few tokens from the memory and the next segment, works on these alone, emits them, and writes the
    memory. So a step costs the same however long the stream is; in training the inside of one step is kept, and the
    memory between steps. The mean of what is emitted goes to a new head. The encoder is frozen and runs without a graph
    (`freeze`). For streams that come from somewhere else take `tightfit.nn.TokenTuringStream`, which is this head.

    Fields:
        tokens: read and emitted in a step.
        memory: tokens of memory.
        segment: the encoder's tokens that a step reads.
        unit: "transformer", or "simplified", which works on memory and tokens read together.
        layers, mlp, heads, dropout: of that transformer; heads=None: as many as the encoder has.
        summariser: tokens are summed up with weights from an "mlp", or by learned queries ("query").
        positions: every place of memory, segment and output has an embedding.
        write: "summarise", or "erase_add" to a part of each memory token.
        pool: the head gets the "mean" of all steps, or the "last" one.
        num_labels: of the new head; None: as many as the model's own.
        freeze: the encoder does not train.
        seed: of new weights.

    Raises:
        TypeError, ValueError: a field out of range; heads that do not divide the encoder's width (when applied).
        UnsupportedModelError: the model classifies neither texts nor images (when applied).

    Example:
        >>> import tightfit
        >>> tightfit.TokenTuringMachine(memory=96, tokens=16, unit="simplified")
        TokenTuringMachine(tokens=16, memory=96, unit='simplified')

    Source: arXiv 2211.09119, section 3. Deviations: position embeddings are on by default; "erase_add" bounds what is
    erased; "simplified" gives memory fixed places. The authors saw it on features of video frames.
    """

    tokens: int = 8
    memory: int = 64
    segment: int = 32
    unit: str = "transformer"
    layers: int = 4
    mlp: int = 512
    heads: int | None = None
    dropout: float = 0.0
    summariser: str = "mlp"
    positions: bool = True
    write: str = "summarise"
    pool: str = "mean"
    num_labels: int | None = None
    freeze: bool = True
    seed: int = 0

    name: ClassVar[str] = "token-turing-machine"
    paper: ClassVar[str] = "2211.09119"
    touches: ClassVar[frozenset[Slot]] = frozenset({Slot.TRAINABLE, Slot.NEW_PARAMETERS, Slot.LOSS})
    exact: ClassVar[bool] = False
    reversible: ClassVar[bool] = True
    summary: ClassVar[str] = "a head with a memory that reads the encoder's tokens as a stream"

    def __post_init__(self) -> None:
        for field in ("tokens", "memory", "segment", "layers", "mlp"):
            check_int(self, field, 1)
        check_int(self, "heads", 1, optional=True)
        check_int(self, "num_labels", 1, optional=True)
        check_choice(self, "unit", UNITS)
        check_choice(self, "summariser", SUMMARISERS)
        check_choice(self, "write", WRITES)
        check_choice(self, "pool", ("mean", "last"))
        check_float(self, "dropout", 0, 1, open_high=True)
        check_bool(self, "positions")
        check_bool(self, "freeze")
        check_int(self, "seed", 0)
        if self.unit == "simplified" and self.write != "summarise":
            raise ValueError(
                f"{METHOD}(unit='simplified'): got write={self.write!r}, but this unit gives the next memory itself; "
                f"leave `write` out"
            )

    def freezes(self, model: nn.Module) -> Iterator[str]:
        # the model's own head, and the pooler before it, are not used: the logits come from the stream
        base = hfmodel.backbone(model)[0]
        for name, _ in model.named_parameters():
            if self.freeze or not name.startswith(f"{base}.") or name.startswith(f"{base}.pooler."):
                yield name

    def edits(self, model: nn.Module, context: Context) -> Iterator[Edit]:
        config = self._checked(model)
        labels: int = self.num_labels or config.num_labels
        reading = Reading(self.freeze, labels)

        def state(module: nn.Module) -> dict[str, Any]:
            return {"reading": reading}

        yield TrainableEdit(parameters=tuple(self.freezes(model)), trainable=False, note="frozen")
        yield ChildEdit(
            module="",
            child=STREAM,
            make=functools.partial(self._make, model, labels),
            trained=f"{METHOD} trained behind the encoder",
            note=f"{self.memory} tokens of memory, {self.tokens} read of each {self.segment}",
        )
        blocks = tuple(block for stack in hfmodel.stacks(model) for block in stack) if self.freeze else ()
        yield ClaimEdit(
            slot=Slot.NEW_PARAMETERS,
            exclusive=self.freeze,
            named="blocks",
            places=inner_claims(model, blocks),
            note="no graph" if self.freeze else "",
        )
        yield CallEdit(slot=Slot.LOSS, where="backbone", mixin=Noted, state=state, note="its tokens are read")
        yield CallEdit(slot=Slot.LOSS, where="model", mixin=StreamModel, state=state, part=reading, note="new head")

    def _checked(self, model: nn.Module) -> Any:
        config = hfmodel.text_config(model)
        if task_of(model) not in ("sequence", "image") or hfmodel.backbone(model)[1] is model:
            raise UnsupportedModelError(
                f"{METHOD}: {type(model).__name__} is no classifier of texts or images, and this is a head for those; "
                f"tightfit.nn.TokenTuringStream reads any stream of tokens"
            )
        if getattr(config, "is_encoder_decoder", False):
            raise UnsupportedModelError(f"{METHOD}: {type(model).__name__} is an encoder-decoder, it has two streams")
        width = getattr(config, "hidden_size", None)
        if not isinstance(width, int):
            raise UnsupportedModelError(f"{METHOD}: the config of {type(model).__name__} names no hidden_size")
        check_heads(METHOD, width, self._heads(config), self.summariser)
        return model.config

    def _heads(self, config: Any) -> int:
        return self.heads if self.heads is not None else config.num_attention_heads

    def _make(self, model: nn.Module, labels: int, owner: nn.Module) -> nn.Module:
        config = hfmodel.text_config(model)

        def make() -> nn.Module:
            stream = TokenTuringStream(
                config.hidden_size,
                inputs=self.segment,
                tokens=self.tokens,
                memory=self.memory,
                unit=self.unit,
                layers=self.layers,
                mlp=self.mlp,
                heads=self._heads(config),
                dropout=self.dropout,
                summariser=self.summariser,
                positions=self.positions,
                write=self.write,
            )
            return StreamHead(stream, self.segment, labels, self.pool)

        return fresh(model, self.seed, make)
