"""Permanent trimming: a smaller stock checkpoint, table, head, tokenizer and configs together."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tightfit.core import hfmodel
from tightfit.core.artifacts import replacing_folder
from tightfit.core.errors import ArtifactError, StateError, UnsupportedModelError, shorten
from tightfit.core.tight import is_tight
from tightfit.methods.partial_embedding.scan import biased_sequences, is_id_field, is_id_table, required_ids
from tightfit.methods.partial_embedding.tables import Tables, find_tables
from tightfit.methods.partial_embedding.tokenizer import TrimError, TrimmedTokenizer, trim_tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrimReport:
    """What a permanent trim has written.

    Attributes:
        folder: the new checkpoint.
        ids: (K,) original ids of the new rows; new id `n` was `ids[n]`.
        rows_before, rows_after: of each vocabulary-sized tensor.
        parameters_before, parameters_after: of the whole model.
        bytes_before, bytes_after: of its parameters and buffers, each storage once.
        added: original ids kept beyond those asked for; `reasons` says why for each.
        unreachable: kept ids that no text gives, in the original tokenizer neither.
    """

    folder: Path
    ids: tuple[int, ...]
    rows_before: int
    rows_after: int
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    added: tuple[int, ...] = ()
    reasons: Mapping[int, str] = dataclasses.field(default_factory=dict)
    unreachable: tuple[int, ...] = ()

    def __str__(self) -> str:
        lines = [
            f"{'rows':<12}{self.rows_before:>16,} -> {self.rows_after:,}",
            f"{'parameters':<12}{self.parameters_before:>16,} -> {self.parameters_after:,}",
            f"{'bytes':<12}{self.bytes_before:>16,} -> {self.bytes_after:,}",
        ]
        if self.added:
            lines.append(f"{len(self.added)} ids were kept beyond those asked for (reasons tells why)")
        if self.unreachable:
            lines.append(f"{len(self.unreachable)} kept ids are never produced by the tokenizer")
        return "\n".join([*lines, f"written to {self.folder}"])


def trim_model(
    model: nn.Module,
    tokenizer: Any,
    ids: Iterable[int],
    folder: str | os.PathLike,
    *,
    close: bool = False,
) -> TrimReport:
    """Write a stock checkpoint whose vocabulary is `ids` only, with its tokenizer; the model itself stays as it is.

    Kept rows, and so hidden states and logits of kept ids, are unchanged; every vocabulary-sized tensor is sliced
    (tables, heads, biases, constants), ties and dtypes are kept, and the ids in config and generation config are
    renumbered. Ids that tokenizer or configs need are added and reported. Texts outside the kept vocabulary are read
    in another way afterwards: count them with `tokenizer.retokenisation_report`.

    Args:
        model: a stock model, without a recipe and without adapters.
        tokenizer: its fast tokenizer.
        ids: original ids to keep.
        folder: a new folder for model and tokenizer; written whole or not at all.
        close: add the merge parents that kept BPE tokens need, instead of raising.

    Raises:
        ValueError: ids that are no ids of this model or tokenizer; merge parents missing while `close` is False; a pad
            id that would move in a model that counts its positions from it.
        StateError: a recipe or adapters on the model, or weights that are sharded or not loaded.
        UnsupportedModelError: no plain token table, a quantised model, a slow tokenizer.
        ArtifactError: the folder exists and is not empty.

    Example:
        >>> import tempfile
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
        >>> words = models.WordLevel({"[PAD]": 0, "[UNK]": 1, "sea": 2, "sky": 3}, unk_token="[UNK]")
        >>> tokenizer = PreTrainedTokenizerFast(
        ...     tokenizer_object=Tokenizer(words), pad_token="[PAD]", unk_token="[UNK]"
        ... )
        >>> sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = trim_model(BertModel(BertConfig(vocab_size=4, **sizes)), tokenizer, [3], folder)
        ...     BertModel.from_pretrained(folder).config.vocab_size
        3
        >>> report.ids, report.added
        ((0, 1, 3), (0, 1))

    Source: the permanent form of PEMA (arXiv 2309.08708), as TextPruner and hf-trim offer it for some families; here
    the tensors are found by identity, so any model works.
    """
    _refuse_unready(model)
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ArtifactError(f"{folder}: exists and is not an empty folder; give a new folder")
    tables = find_tables(model)
    trimmed, reasons = _trimmed(model, tokenizer, ids, tables.size, close)
    rank = {original: new for new, original in enumerate(trimmed.ids)}
    _check_positions(model, tables, rank)

    small = _small_model(model, tables, trimmed.ids, rank)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replacing_folder(folder) as temporary:
        small.save_pretrained(temporary)
        trimmed.tokenizer.save_pretrained(temporary)
    return TrimReport(
        folder=folder,
        ids=trimmed.ids,
        rows_before=tables.size,
        rows_after=len(trimmed.ids),
        parameters_before=sum(p.numel() for p in model.parameters()),
        parameters_after=sum(p.numel() for p in small.parameters()),
        bytes_before=hfmodel.unique_storage_bytes(model.state_dict().values()),
        bytes_after=hfmodel.unique_storage_bytes(small.state_dict().values()),
        added=tuple(sorted(reasons)),
        reasons=dict(sorted(reasons.items())),
        unreachable=trimmed.unreachable,
    )


def _refuse_unready(model: Any) -> None:
    name = type(model).__name__
    if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
        raise UnsupportedModelError(f"trim: {name} is no transformers model (it has no config or save_pretrained)")
    if any(is_tight(module) for module in model.modules()):
        raise StateError(f"trim: {name} carries a recipe; call its remove() or merge() first")
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise StateError(f"trim: {name} carries adapters; merge them first (merge_and_unload)")
    reason = hfmodel.refuse_wrapped(model)
    if reason:
        raise StateError(f"trim: {reason}; unwrap or gather the model first")
    if any(p.is_meta for p in model.parameters()):
        raise StateError(f"trim: {name} has parameters on the meta device; load its weights first")
    if getattr(model.config, "quantization_config", None) is not None:
        raise UnsupportedModelError(f"trim: {name} is quantised; load it unquantised, trim, and quantise the result")
    if getattr(model.config.get_text_config(), "vocab_size_per_layer_input", None) is not None:
        raise UnsupportedModelError(f"trim: {name} has a second table by token id (embeddings per layer)")


def _trimmed(
    model: nn.Module, tokenizer: Any, ids: Iterable[int], size: int, close: bool
) -> tuple[TrimmedTokenizer, dict[int, str]]:
    """The tokenizer of all kept ids, and the reason for each id that was not asked for."""
    asked = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    outside = sorted(i for i in asked if isinstance(i, int) and not 0 <= i < size)
    if outside:
        raise TrimError(f"trim: ids {shorten(outside)} are outside the model's table of {size} rows")
    needed, why = required_ids(None, model)
    extra = {i: why[i] for i in needed if i not in set(asked)} if asked else {}
    trimmed = trim_tokenizer(tokenizer, [*asked, *extra], close=close)
    beyond = [i for i in trimmed.ids if i >= size]
    if beyond:
        raise TrimError(
            f"trim: the tokenizer needs the ids {shorten(beyond)}, but the model's table has {size} rows; call "
            f"model.resize_token_embeddings(len(tokenizer)) first, if they belong together"
        )
    return trimmed, extra | dict(trimmed.reasons)


def _check_positions(model: Any, tables: Tables, rank: Mapping[int, int]) -> None:
    """RoBERTa and its kin count positions from the pad id, so the pad must keep its number."""
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    if pad is None or rank.get(pad) == pad:
        return
    for name, module in model.named_modules():
        counts = isinstance(module, nn.Embedding) or hasattr(module, "weights")
        if name not in tables.lookups and counts and getattr(module, "padding_idx", None) == pad:
            raise TrimError(
                f"trim: {name} counts positions from the pad id {pad}, which would become {rank[pad]}; keep all ids "
                f"below it too (range({pad}))"
            )


# -- the smaller model ------------------------------------------------------------------------------------------


def _small_model(model: Any, tables: Tables, ids: tuple[int, ...], rank: Mapping[int, int]) -> Any:
    """The model with sliced vocabulary tensors; all other tensors are the source's own."""
    config = copy.deepcopy(model.config)
    if not _renumber(config, tables.size, rank):
        raise UnsupportedModelError(
            f"trim: no config of {type(model).__name__} has vocab_size {tables.size}, the rows of its table; a trimmed "
            f"checkpoint could not say how many rows it has"
        )
    with torch.device("meta"):
        small = type(model)(config)
    state = model.state_dict()
    index = torch.tensor(ids)
    for tensor in tables.all:
        kept = tensor.tensor.detach().index_select(tensor.dim, index.to(tensor.tensor.device))
        state.update({alias.name: kept for alias in tensor.aliases if alias.name in state})
    others = [
        name for name, tensor in small.state_dict().items() if name in state and state[name].shape != tensor.shape
    ]
    if others:
        raise UnsupportedModelError(
            f"trim: {type(model).__name__} has further tensors by token id, whose rows would stay: {shorten(others)}"
        )
    # assigned, so that dtypes stay, nothing is copied, and a head that was untied by its checkpoint stays untied
    small.load_state_dict(state, assign=True)
    _tie_as(small, model)
    if getattr(model, "generation_config", None) is not None:
        small.generation_config = copy.deepcopy(model.generation_config)
        _renumber_fields(small.generation_config, rank)
    return small


def _tie_as(small: nn.Module, model: nn.Module) -> None:
    """One parameter object wherever the source has one."""
    firsts: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        module, _, attribute = name.rpartition(".")
        holder = small.get_submodule(module)
        holder._parameters[attribute] = firsts.setdefault(id(parameter), holder._parameters[attribute])  # type: ignore[arg-type]


def _renumber(config: Any, size: int, rank: Mapping[int, int]) -> bool:
    """Renumber a config and those nested in it, in place; whether any of them named the vocabulary's size."""
    found = getattr(config, "vocab_size", None) == size
    for name in {"vocab_size", *vars(config)}:
        if name.endswith("vocab_size") and getattr(config, name, None) == size:  # Marian's decoder_vocab_size
            setattr(config, name, len(rank))
    _renumber_fields(config, rank)
    nested = [value for value in vars(config).values() if hasattr(value, "to_dict") and hasattr(value, "model_type")]
    return any([found, *(_renumber(value, size, rank) for value in nested)])


def _renumber_fields(holder: Any, rank: Mapping[int, int]) -> None:
    for name, value in list(_fields(holder)):
        if is_id_field(name):
            setattr(holder, name, _renumbered(value, rank))
        elif is_id_table(name, value):
            setattr(holder, name, {key: _renumbered(token, rank) for key, token in value.items()})
        elif name == "sequence_bias":
            renumbered = {_renumbered(sequence, rank): bias for sequence, bias in biased_sequences(value)}
            as_list = [[list(sequence), bias] for sequence, bias in renumbered.items()]
            setattr(holder, name, renumbered if isinstance(value, dict) else as_list)
        elif name == "forced_decoder_ids" and value:
            setattr(holder, name, [[position, _renumbered(token, rank)] for position, token in value])


def _fields(holder: Any) -> Iterator[tuple[str, Any]]:
    return ((name, value) for name, value in vars(holder).items() if value is not None)


def _renumbered(value: Any, rank: Mapping[int, int]) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_renumbered(v, rank) for v in value)
    if isinstance(value, int) and not isinstance(value, bool):
        return rank.get(value, value)  # an id outside the table was none before
    return value
