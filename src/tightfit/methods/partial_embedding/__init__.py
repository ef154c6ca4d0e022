"""PartialEmbedding: train on the vocabulary the data uses, keep the rest aside (arXiv 2309.08708)."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from tightfit.core import hfmodel
from tightfit.core.apply import Applied
from tightfit.core.edits import CallEdit, Edit, Handle, ModuleEdit, ParameterEdit
from tightfit.core.errors import UnsupportedModelError, shorten
from tightfit.core.fields import check_bool, check_choice
from tightfit.core.transform import Context, Slot, Transform
from tightfit.methods.partial_embedding.head import HeadEdit
from tightfit.methods.partial_embedding.lookup import GeneratesMixin, GrowMixin, GuardMixin, LookupEdit
from tightfit.methods.partial_embedding.tables import Tables, VocabularyTensor, find_tables
from tightfit.methods.partial_embedding.vocabulary import RowCodec, Vocabulary

if TYPE_CHECKING:
    from tightfit.methods.partial_embedding.trim import TrimReport

__all__ = ["PartialEmbedding", "Vocabulary"]

MIN_SAVING = 0.02


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartialEmbedding(Transform):
    """Hold only the embedding rows of the token ids a run uses; the others wait in a host-side store.

    Rows of unused ids get no gradient, yet cost weight, gradient and two Adam moments: 16 bytes a parameter in fp32.
    The input side is lossless: with weight decay 0 the kept rows and all other parameters of a model without a
    language-model head train bit for bit as in the stock run. Everything outside the model (tokenizer, data,
    collators, labels, state dicts) keeps original ids and stock shapes. A language-model head is given a chunked
    cross-entropy that never holds tokens x vocabulary; it equals the stock loss up to rounding.

    Fields:
        ids: kept token ids, any iterable of distinct ints; `PartialEmbedding.scan` finds them.
        head: for models that predict tokens. "full": all head rows train (a tied table then stays whole and only
            the chunked loss saves memory). "split": kept rows train, dropped rows stay frozen but take part in the
            softmax; exact when the head is frozen anyway (LoRA). "pruned": dropped rows are absent; the loss is biased
            low by -log(1 - their probability), which is reported. "auto": split when the head is frozen, else full.
        unknown: what an id outside `ids` does: "error", "grow" (the row joins, with zero moments), or "fetch" (read
            from the store; for evaluation, or for frozen tables).
        decay_dropped: shrink the dropped rows as AdamW's weight decay would have done in the stock run; by default
            they keep their pretrained values, and only they differ from the stock run.
        force: apply even if less than 2 % of the training bytes are saved.
        tokenizer: names tokens in error messages; not part of the value.

    Raises:
        ValueError: ids empty, duplicated or not integers; a choice out of range; (when applied) ids outside the
            vocabulary, ids that the model's config uses missing, or a saving below 2 %.
        UnsupportedModelError: (when applied) no plain floating-point embedding table.

    Example:
        >>> import tightfit
        >>> from transformers import BertConfig
        >>> model = tightfit.skeleton(BertConfig(), task="sequence-classification")
        >>> recipe = tightfit.PartialEmbedding(ids=range(5000))
        >>> tightfit.plan(model, recipe, batch=(8, 64)).trainable_parameters
        89882882

    Limits: adapters on the embedding itself are refused. Apply before wrapping in DDP or FSDP2. Optimizers other than
    AdamW-like ones that mix rows (Adafactor's clipping, blockwise 8-bit states) are equal only approximately.

    Source: PEMA, arXiv 2309.08708, section 3. Deviations: ids are remapped inside the model instead of in the dataset;
    ties are kept; special and config ids are always kept; heads have their own treatment.
    """

    ids: tuple[int, ...] | None = None
    head: str = "auto"
    unknown: str = "error"
    decay_dropped: bool = False
    force: bool = False
    tokenizer: Any = dataclasses.field(default=None, compare=False, repr=False)

    name: ClassVar[str] = "partial-embedding"
    paper: ClassVar[str] = "2309.08708"
    touches: ClassVar[frozenset[Slot]] = frozenset({Slot.WEIGHTS, Slot.OPERATORS, Slot.INPUTS, Slot.LOSS})
    exact: ClassVar[bool] = True
    reversible: ClassVar[bool] = True
    summary: ClassVar[str] = "train only the embedding rows that the data uses"

    def __post_init__(self) -> None:
        check_choice(self, "head", ("auto", "full", "split", "pruned"))
        check_choice(self, "unknown", ("error", "grow", "fetch"))
        check_bool(self, "decay_dropped")
        check_bool(self, "force")
        if self.ids is not None:
            object.__setattr__(self, "ids", _as_ids(self.ids))

    def is_exact(self) -> bool:
        return self.head in ("auto", "full")

    def readable_ids(self) -> tuple[int, ...] | None:
        return self.ids if self.unknown == "error" else None

    def unfilled(self) -> str | None:
        if self.ids is None:
            return (
                "ids are missing; give ids=..., or let PartialEmbedding.scan(data, tokenizer=..., model=...) find them"
            )
        return None

    # -- finding the ids ----------------------------------------------------------------------------------------

    @classmethod
    def scan(
        cls,
        data: Any,
        *,
        tokenizer: Any = None,
        model: nn.Module | None = None,
        columns: Sequence[str] | None = None,
        max_length: int | None = None,
        samples: int | None = None,
        min_count: int = 1,
        keep: Iterable[int] = (),
        progress: bool = True,
        **fields: Any,
    ) -> PartialEmbedding:
        """Find the ids that `data` uses and return the transform with them filled in.

        Args:
            data: texts, rows, a `datasets` object, a DataLoader, or any iterable of batches; all splits that the run
                will see. A generator is consumed.
            tokenizer: needed for texts; its special tokens are kept.
            model: its config ids are kept, and it gives the vocabulary size.
            columns: text columns; default: all string columns.
            max_length: truncate as the run will.
            samples: how many rows of an endless stream to read.
            min_count: drop ids seen fewer times (1 keeps all).
            keep: further ids to keep.
            **fields: the other fields of the transform.

        Raises:
            ValueError: no id found, an id outside the vocabulary, or a stream without length and `samples`.
        """
        from tightfit.methods.partial_embedding.scan import count_ids, required_ids, union_across_ranks

        if isinstance(min_count, bool) or not isinstance(min_count, int) or min_count < 1:
            raise ValueError(f"PartialEmbedding.scan(min_count=...): got {min_count!r}, accepted is an int >= 1")
        size = find_tables(model).size if model is not None else None
        counts = count_ids(
            data,
            tokenizer=tokenizer,
            columns=columns,
            max_length=max_length,
            vocab_size=size,
            samples=samples,
            progress=progress,
        )
        mask = counts >= min_count
        required, _ = required_ids(tokenizer, model)
        keep = list(keep)
        odd = [i for i in keep if not 0 <= i < len(mask)]
        if odd:
            raise ValueError(
                f"PartialEmbedding.scan(keep=...): {shorten(odd)} outside the vocabulary of {len(mask)} ids"
            )
        mask[[i for i in (*required, *keep) if i < len(mask)]] = True
        mask = union_across_ranks(mask)
        return cls(ids=tuple(int(i) for i in mask.nonzero()[0]), tokenizer=tokenizer, **fields)

    def fill(
        self, *, data: Any, tokenizer: Any = None, model: nn.Module | None = None, **options: Any
    ) -> PartialEmbedding:
        """This transform with `ids` found in `data`, its other fields kept."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("ids", "tokenizer")}
        return type(self).scan(data, tokenizer=tokenizer, model=model, **options, **fields)

    @staticmethod
    def of(applied: Applied) -> Vocabulary:
        """The live vocabulary of an applied recipe: `PartialEmbedding.of(applied).grow(ids)`."""
        return applied.part(Vocabulary)

    def trim(self, model: nn.Module, tokenizer: Any, folder: Any, *, close: bool = False) -> TrimReport:
        """Write a permanently smaller model with its smaller tokenizer; see `trim.trim_model`."""
        from tightfit.methods.partial_embedding.trim import trim_model

        missing = self.unfilled()
        if missing:
            raise ValueError(f"PartialEmbedding: {missing}")
        assert self.ids is not None
        return trim_model(model, tokenizer, self.ids, folder, close=close)

    # -- describing the edits -----------------------------------------------------------------------------------

    def edits(self, model: nn.Module, context: Context) -> Iterator[Edit]:
        assert self.ids is not None
        tables = find_tables(model)
        self._check_ids(model, tables)
        head = self._head_mode(model, tables, context)
        if head in ("split", "pruned") and tables.beside:
            raise UnsupportedModelError(
                f"PartialEmbedding(head={head!r}): {type(model).__name__} predicts tokens with {tables.beside[0]} "
                f"beside {tables.head}, so the head cannot hold some rows only; use head='full'"
            )
        reduced = self._reduced(tables, head)
        self._check_saving(model, context, reduced)
        self._check_decay(model, tables, head, context)
        vocabulary = Vocabulary(self.ids, tables.size, self.unknown, head, self.decay_dropped, self.tokenizer)
        kept = f"{len(self.ids):,} of {tables.size:,} rows"
        for tensor in reduced:
            yield RowEdit(
                aliases=tensor.aliases, part=vocabulary, codec=lambda full: RowCodec(full, vocabulary), note=kept
            )
        if reduced:
            for name in tables.lookups:
                lookup = model.get_submodule(name)
                if not any(lookup.weight is tensor.tensor for tensor in reduced):
                    continue  # a decoder's own table that is tied to a full head
                if not isinstance(lookup, nn.Embedding):
                    kind = type(lookup).__name__
                    raise UnsupportedModelError(f"PartialEmbedding: {name} is a {kind}, accepted is an nn.Embedding")
                yield LookupEdit(module=name, part=vocabulary)
            yield ModuleEdit(
                slot=Slot.INPUTS,
                module="",
                mixin=GuardMixin,
                state=lambda m: {"vocabulary": vocabulary},
                part=vocabulary,
            )
            if self.unknown == "error" and callable(getattr(model, "generate", None)):
                yield ModuleEdit(
                    slot=Slot.INPUTS, module="", mixin=GeneratesMixin, state=lambda m: {"vocabulary": vocabulary}
                )
            if self.unknown == "grow":
                yield from self._growth(model, vocabulary, labels=tables.head is not None)
        if tables.head is not None:
            note = f"head {head}, chunked loss"
            if not reduced:
                note += "; the tied table trains as a whole, so its rows are all kept"
            yield HeadEdit(module=tables.head, part=vocabulary, reduced=head in ("split", "pruned"), note=note)

    def _growth(self, model: nn.Module, vocabulary: Vocabulary, labels: bool) -> Iterator[Edit]:
        # a trainer may call the backbone directly; labels (which make decoder ids) are seen by the model only
        _, inner = hfmodel.backbone(model)
        for where in ("backbone",) if inner is model or not labels else ("model", "backbone"):
            sees_labels = labels and (where == "model" or inner is model)
            yield CallEdit(
                mixin=GrowMixin,
                where=where,
                state=lambda m, sees=sees_labels: {"vocabulary": vocabulary, "labels": sees},  # type: ignore[misc]
                part=vocabulary,
            )

    def _head_mode(self, model: nn.Module, tables: Tables, context: Context) -> str:
        if tables.output is None:
            return "none"
        if self.head != "auto":
            return self.head
        return "full" if context.trains(model, tables.output.tensor) else "split"  # type: ignore[arg-type]

    def _reduced(self, tables: Tables, head: str) -> list[VocabularyTensor]:
        if head == "none":
            return list(tables.inputs)
        if head == "full":
            return [t for t in tables.inputs if tables.output is None or t.tensor is not tables.output.tensor]
        assert tables.output is not None
        extra = [] if tables.tied else [tables.output]
        return [*tables.inputs, *extra, *tables.biases]

    def _check_ids(self, model: nn.Module, tables: Tables) -> None:
        from tightfit.methods.partial_embedding.scan import required_ids

        assert self.ids is not None
        wrong = [i for i in self.ids if not 0 <= i < tables.size]
        if wrong:
            raise ValueError(f"PartialEmbedding(ids=...): {shorten(wrong)} outside the vocabulary of {tables.size} ids")
        needed, reasons = required_ids(self.tokenizer, model)
        missing = sorted(set(needed) - set(self.ids))
        if missing:
            named = [f"{i} ({reasons[i]})" for i in missing]
            raise ValueError(
                f"PartialEmbedding(ids=...): ids that {type(model).__name__} or its tokenizer use are missing: "
                f"{shorten(named)}; add them (PartialEmbedding.scan does)"
            )

    def _check_decay(self, model: nn.Module, tables: Tables, head: str, context: Context) -> None:
        if not self.decay_dropped or head not in ("split", "pruned") or tables.output is None:
            return
        if context.trains(model, tables.output.tensor):  # type: ignore[arg-type]
            raise ValueError(
                f"PartialEmbedding(decay_dropped=True, head={head!r}): dropped rows of a trainable head are moved by "
                f"more than weight decay in the stock run; leave decay_dropped out, or use head='full'"
            )

    def _check_saving(self, model: nn.Module, context: Context, reduced: list[VocabularyTensor]) -> None:
        if self.force or not reduced:
            return

        def cost(tensor: torch.Tensor, rows: float = 1.0) -> float:
            trains = isinstance(tensor, nn.Parameter) and context.trains(model, tensor)
            return tensor.numel() * tensor.element_size() * (4 if trains else 1) * rows

        assert self.ids is not None
        total = sum(cost(p) for p in model.parameters())
        saved = sum(cost(t.tensor, 1 - len(self.ids) / t.tensor.shape[t.dim]) for t in reduced)
        if saved < MIN_SAVING * total:
            raise ValueError(
                f"PartialEmbedding: keeping {len(self.ids)} ids saves {100 * saved / total:.2f} % of the bytes of "
                f"weights, gradients and optimizer state of {type(model).__name__}, less than "
                f"{100 * MIN_SAVING:.0f} %; leave it out, or set force=True"
            )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RowEdit(ParameterEdit):
    """A parameter edit that registers its table with the vocabulary, so that it can grow."""

    part: Vocabulary

    def run(self, model: nn.Module) -> Handle:
        handle = super().run(model)
        alias = self.aliases[0]
        self.part.tables.append((self.part.codecs[-1], model.get_submodule(alias.module_name), alias.attribute))
        self.part.watch()
        return handle


def _as_ids(given: Any) -> tuple[int, ...]:
    values = given.tolist() if hasattr(given, "tolist") else given
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise ValueError(f"PartialEmbedding(ids=...): got {given!r}, accepted is an iterable of distinct ints")
    values = list(values)
    odd = [v for v in values if isinstance(v, bool) or not (isinstance(v, int) or _is_integer(v))]
    if odd:
        raise ValueError(f"PartialEmbedding(ids=...): not integers: {shorten(map(repr, odd))}")
    ids = sorted(int(v) for v in values)
    if not ids:
        raise ValueError("PartialEmbedding(ids=...): got no ids, accepted is at least one")
    if ids[0] < 0:
        raise ValueError(f"PartialEmbedding(ids=...): got {ids[0]}, accepted are ids from 0 on")
    twice = sorted({a for a, b in itertools.pairwise(ids) if a == b})
    if twice:
        raise ValueError(f"PartialEmbedding(ids=...): given more than once: {shorten(twice)}")
    return tuple(ids)


def _is_integer(value: Any) -> bool:
    return hasattr(value, "__index__")
