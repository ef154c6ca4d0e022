"""RecurrentMemory: memory tokens that carry what a model has read from segment to segment (arXiv 2207.06881)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any, ClassVar

from torch import nn

from tightfit.core import hfmodel
from tightfit.core.edits import CallEdit, ChildEdit, Claim, Edit, ModuleEdit
from tightfit.core.fields import check_bool, check_choice, check_int
from tightfit.core.transform import Context, Slot, Transform
from tightfit.methods.recurrent_memory.calls import MemoryModel, MemoryReader
from tightfit.methods.recurrent_memory.decoding import Generates
from tightfit.methods.recurrent_memory.facts import Facts, check_masks, facts_of
from tightfit.methods.recurrent_memory.reading import CHILD, drawn, spread
from tightfit.methods.recurrent_memory.recurrence import Recurrence, Settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecurrentMemory(Transform):
    """Read rows longer than the model's window in segments, and carry memory tokens from each to the next.

    A decoder reads [memory; segment; memory], and its last hidden states at the second memory are the next segment's
    memory; an encoder reads [class token; memory; separator; segment; separator]. The memory that a row begins with is
    trained. A training step keeps the activations of one segment at a time, and the memories between segments: in
    backward each segment but the last runs again. Loss and gradients are those of the whole recurrence, and the cost of
    a row is linear in its length.

    Outputs are shaped like the input, in the stock class: with labels for each token, logits are None in training, and
    joined over all segments otherwise; sequence classifiers give what they see in the last segment.

    Fields:
        tokens: memory tokens, m. 0: segments know nothing of each other.
        segment: tokens of a row in one segment; None: what the model's window holds beside the memory.
        bptt: gradients go back through all segments ("full"), are cut behind every D + 1-th ("block:D"), or behind
            every one ("none").
        replay: False keeps the activations of all segments instead of running them again.
        attention: both memories see themselves whole ("bidirectional"), or each slot the earlier ones ("causal"). An
            encoder's tokens see everything.
        align: where the segment stands that is not full: at the end of a row ("left") or at its start ("right"). None:
            "left" for decoders, "right" for encoders. A decoder's language model takes "left" only.
        curriculum: train on 1 segment of each row first, and on one more after every so many training forwards; None:
            on all. Decoders take a row's first segments, other heads its last.
        seed: of the memory's first values.

    Raises:
        TypeError, ValueError: a field out of range; when applied, more tokens than the model's window holds.
        UnsupportedModelError: an encoder-decoder, a head without segments, embeddings of another width than hidden
            states, or memory slots that cannot see each other both ways (when applied).

    Example:
        >>> import tightfit, torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, max_position_embeddings=12, **sizes))
        >>> applied = tightfit.apply(model, tightfit.RecurrentMemory(tokens=2, segment=8))
        >>> ids = torch.arange(40)[None]
        >>> model(input_ids=ids, labels=ids).loss.backward()
        >>> model.model.memory_tokens.weight.grad.shape
        torch.Size([2, 16])

    Source: arXiv 2207.06881, section 3. Deviations: segments are run again in backward instead of kept; in ragged
    batches the memory to write follows a row's last token, and padding stands behind it; each slot has its own first
    value.
    """

    tokens: int = 10
    segment: int | None = None
    bptt: str = "full"
    replay: bool = True
    attention: str = "bidirectional"
    align: str | None = None
    curriculum: int | None = None
    seed: int = 0

    name: ClassVar[str] = "recurrent-memory"
    paper: ClassVar[str] = "2207.06881"
    touches: ClassVar[frozenset[Slot]] = frozenset({Slot.NEW_PARAMETERS, Slot.LOSS})
    exact: ClassVar[bool] = False
    reversible: ClassVar[bool] = True
    long_rows: ClassVar[bool] = True
    summary: ClassVar[str] = "long rows in segments, with memory tokens between them; activations of one segment"

    def __post_init__(self) -> None:
        check_int(self, "tokens", 0)
        check_int(self, "segment", 1, optional=True)
        check_bool(self, "replay")
        check_choice(self, "attention", ("bidirectional", "causal"))
        if self.align is not None:
            check_choice(self, "align", ("left", "right"))
        check_int(self, "curriculum", 1, optional=True)
        check_int(self, "seed", 0)
        if not isinstance(self.bptt, str):
            raise TypeError(f"RecurrentMemory(bptt=...): got {self.bptt!r}, accepted is {_BPTT}")
        if self.bptt not in ("full", "none") and not re.fullmatch(r"block:\d+", self.bptt):
            raise ValueError(f"RecurrentMemory(bptt=...): got {self.bptt!r}, accepted is {_BPTT}")

    @property
    def depth(self) -> int | None:
        """Boundaries that a gradient goes through at most; None: all."""
        if self.bptt == "full":
            return None
        return 0 if self.bptt == "none" else int(self.bptt.removeprefix("block:"))

    def edits(self, model: nn.Module, context: Context) -> Iterator[Edit]:
        facts = facts_of(model)
        where = type(model).__name__
        if not facts.causal and self.attention == "causal":
            raise ValueError(
                f"RecurrentMemory(attention='causal'): {where} is an encoder, whose tokens see everything; leave it out"
            )
        if facts.causal and self.align == "right" and facts.head in ("causal", "hidden"):
            raise ValueError(
                f"RecurrentMemory(align='right'): {where} predicts the next token from the start of a row on; accepted "
                f"is 'left'"
            )
        both_ways = facts.causal and self.attention == "bidirectional" and self.tokens > 0
        if both_ways:
            check_masks(model)
        segment = self._segment(where, facts)
        align = self.align or ("left" if facts.causal else "right")
        settings = Settings(self.tokens, segment, self.depth, self.replay, both_ways, align, self.curriculum)
        recurrence = Recurrence(settings, facts)

        def state(module: nn.Module) -> dict[str, Any]:
            return {"recurrence": recurrence}

        if self.tokens:
            wide = spread(model.get_submodule(facts.reader))  # of all rows, whatever becomes of them in this recipe
            yield _TokensEdit(
                through=tuple(hfmodel.block_linears(model)),
                module=facts.reader,
                child=CHILD,
                make=lambda reader: drawn(reader, self.tokens, self.seed, wide),
                trained="RecurrentMemory trained",
                note=f"{self.tokens} memory tokens",
            )
        note = f"segments of {segment} tokens"
        yield _ReaderEdit(slot=Slot.LOSS, module=facts.reader, mixin=MemoryReader, state=state, part=recurrence)
        if facts.head != "hidden":
            yield CallEdit(slot=Slot.LOSS, where="model", mixin=MemoryModel, state=state, note=note)
        if facts.head == "causal" and hasattr(model, "generate"):
            yield CallEdit(slot=Slot.LOSS, where="model", mixin=Generates, state=state, note="generates")

    def _segment(self, where: str, facts: Facts) -> int:
        """Tokens of a segment.

        Raises:
            ValueError: memory and segment are longer than the model's window.
        """
        beside = 2 * self.tokens if facts.causal else self.tokens + 3 if self.tokens else 2
        if facts.window is None:
            if self.segment is None:
                raise ValueError(
                    f"RecurrentMemory(segment=None): {where} names no longest sequence; give the tokens of a segment"
                )
            return self.segment
        segment = self.segment if self.segment is not None else facts.window - max(beside, 2 * self.tokens)
        if segment < 1 or segment + beside > facts.window:
            parts = f"{self.tokens} memory tokens ({beside} places beside the text)"
            raise ValueError(
                f"RecurrentMemory(tokens={self.tokens}, segment={self.segment}): {where} has positions for "
                f"{facts.window} tokens, and {parts} leave room for segments of 1 to {max(facts.window - beside, 0)}"
            )
        return segment


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _TokensEdit(ChildEdit):
    """The memory's parameters; their gradient comes back through the blocks, so these must run with a graph."""

    through: tuple[str, ...]

    def claims(self) -> frozenset[Claim]:
        return super().claims() | {(self.slot, name) for name in self.through}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _ReaderEdit(ModuleEdit):
    """The reader's part. Others must not keep tensors of a segment that runs again as a whole, nor give it a cache."""

    exclusive: bool = True

    def claims(self) -> frozenset[Claim]:
        return super().claims() | {(Slot.INPUTS, "(cache)"), (Slot.SAVED_TENSORS, "(backbone)")}


_BPTT = "'full', 'none' or 'block:D' with the boundaries that gradients go through, D >= 0"
