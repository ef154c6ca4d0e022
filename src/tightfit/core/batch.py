"""Batches as the planner takes them: checked against the model before anything is simulated, cut into parts."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tightfit.core import hfmodel
from tightfit.core.errors import DataError
from tightfit.core.fields import near

Batch = Mapping[str, Any] | tuple[int, int]

_TOKENS = ("input_ids", "decoder_input_ids")
_EMBEDDED = ("inputs_embeds", "decoder_inputs_embeds")
_BY_ROW = (*_TOKENS, *_EMBEDDED, "attention_mask", "decoder_attention_mask", "token_type_ids", "labels")
_ACCEPTED = "batch: got {}, accepted is a dict of tensors or (batch_size, length)"


def describe_batch(batch: Any) -> str:
    """A batch in a few words.

    >>> describe_batch((8, 128))
    '8 x 128 (padded)'
    """
    if isinstance(batch, Mapping):
        return ", ".join(f"{k} {'x'.join(map(str, v.shape))}" for k, v in batch.items() if torch.is_tensor(v))
    size, length = _pair(batch)
    return f"{size} x {length} (padded)"


def check_batch(model: nn.Module, batch: Any, *, long_rows: bool = False) -> None:
    """Refuse a batch that this model cannot be called with, naming the part that does not fit.

    Rows may be longer than the model has positions with `long_rows`.

    Raises:
        DataError: neither a dict nor a pair of sizes, keys the model does not take or lacks, different numbers of
            rows, more tokens than the model has positions, or token ids outside its vocabulary.
    """
    limit = None if long_rows else positions(model)
    if not isinstance(batch, Mapping):
        _, length = _pair(batch)
        if limit is not None and length > limit:
            raise DataError(f"batch: length {length} is above the {limit} positions of {type(model).__name__}")
        return
    _check_keys(model, batch)
    rows_of(batch)
    for key in (*_TOKENS, *_EMBEDDED):
        value = batch.get(key)
        if value is None or value.dim() < 2:
            continue
        length = value.shape[-1] if key in _TOKENS else value.shape[-2]
        if limit is not None and length > limit:
            raise DataError(f"batch[{key!r}]: {length} tokens, {type(model).__name__} has positions for {limit}")
        if key in _TOKENS:
            _check_ids(model, key, value)


def rows_of(batch: Batch) -> int:
    """Rows of a batch.

    Beside tokens there may be tensors that do not go by rows: patches of images, ends of packed sequences, positions.

    Raises:
        DataError: its tensors do not agree, or it has none.
    """
    if not isinstance(batch, Mapping):
        return _pair(batch)[0]
    sizes = {key: v.shape[0] for key, v in batch.items() if torch.is_tensor(v) and v.dim() > 0}
    if any(key in sizes for key in (*_TOKENS, *_EMBEDDED)):
        sizes = {key: size for key, size in sizes.items() if key in _BY_ROW}
    if len(set(sizes.values())) != 1 or 0 in sizes.values():
        shown = f"rows {', '.join(f'{key} {size}' for key, size in sizes.items())}" if sizes else "no tensors"
        raise DataError(f"batch: got {shown}; accepted is one number of rows >= 1 in all of its tensors")
    return next(iter(sizes.values()))


def cut(batch: Batch, size: int) -> Batch:
    """The `size` rows of a batch that ask for the most memory.

    These are the longest ones. Where the batch has padding and more than one row is taken, the shortest is among
    them: a batch with padding makes the model build a mask.

    >>> cut((8, 128), 2)
    (2, 128)
    """
    if not isinstance(batch, Mapping):
        return (size, batch[1])
    rows = rows_of(batch)
    if size >= rows:
        return batch
    order = torch.arange(rows)
    mask = batch.get("attention_mask")
    if torch.is_tensor(mask) and not mask.is_meta:
        order = mask.flatten(1).sum(1).argsort(descending=True, stable=True)
        if size > 1:
            order = torch.cat([order[: size - 1], order[-1:]])
    picked = order[:size]
    return {k: v[picked.to(v.device)] if _goes_by_row(v, rows) else v for k, v in batch.items()}


def _goes_by_row(value: Any, rows: int) -> bool:
    return torch.is_tensor(value) and value.dim() > 0 and value.shape[0] == rows


def length_of(batch: Batch) -> int | None:
    """Tokens per row, None for a batch without tokens."""
    if not isinstance(batch, Mapping):
        return batch[1]
    ids = batch.get("input_ids")
    return ids.shape[-1] if torch.is_tensor(ids) else None


def positions(model: nn.Module) -> int | None:
    """Tokens per row that the model has learnt or fixed positions for; None where nothing bounds them.

    >>> import tightfit
    >>> from transformers import RobertaConfig
    >>> positions(tightfit.skeleton(RobertaConfig(max_position_embeddings=514, num_hidden_layers=1)))
    512
    """
    limits = []
    for name, module in hfmodel.stock_modules(model):
        last = name.rpartition(".")[2]
        if not isinstance(module, nn.Embedding) or "relative" in name or "token_type" in name:
            continue
        if "position" in last or last == "wpe":
            # some count from the padding id on, some keep a fixed number of rows free
            reserved = module.padding_idx + 1 if module.padding_idx is not None else getattr(module, "offset", 0)
            limits.append(module.num_embeddings - reserved)
    return min(limits, default=None)


def _pair(batch: Any) -> tuple[int, int]:
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise DataError(_ACCEPTED.format(repr(batch)))
    size, length = batch
    for name, value in (("batch_size", size), ("length", length)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise DataError(f"batch: {name} is {value!r}, accepted is an int >= 1")
    return size, length


def _check_keys(model: nn.Module, batch: Mapping[str, Any]) -> None:
    known, anything = _accepted_keys(model)
    if not anything:
        for key in batch:
            if key not in known:
                raise DataError(
                    f"batch[{key!r}]: {type(model).__name__} takes no such input{near(key, sorted(known))}; it takes "
                    f"{', '.join(name for name in known if name in _USUAL) or ', '.join(sorted(known))}"
                )
    for key in (*_TOKENS, *_EMBEDDED):
        if batch.get(key) is not None and not torch.is_tensor(batch[key]):
            raise DataError(f"batch[{key!r}]: got a {type(batch[key]).__name__}, accepted is a tensor")
    main = getattr(model, "main_input_name", None)
    if main in known and not any(batch.get(key) is not None for key in (main, *_EMBEDDED)):
        raise DataError(f"batch: {main!r} is missing; it holds {', '.join(batch) or 'nothing'}")


_USUAL = {"input_ids", "attention_mask", "token_type_ids", "labels", "pixel_values", "start_positions", "end_positions"}


def _accepted_keys(model: nn.Module) -> tuple[dict[str, None], bool]:
    """Names the model can be called with, and whether any other goes too."""
    known: dict[str, None] = {}
    anything = False
    for parameter in inspect.signature(model.forward).parameters.values():
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            known[parameter.name] = None
            continue
        typed = next(iter(typing.get_args(parameter.annotation)), None)
        if typed is None or not hasattr(typed, "__annotations__"):
            anything = True
        for cls in getattr(typed, "__mro__", ()):
            known |= dict.fromkeys(getattr(cls, "__annotations__", {}))
    return known, anything


def _check_ids(model: nn.Module, key: str, ids: torch.Tensor) -> None:
    get_table = getattr(model, "get_input_embeddings", None)
    try:
        table = get_table() if callable(get_table) else None
    except NotImplementedError:
        return
    count = getattr(getattr(model, "config", None), "vocab_size", None) or getattr(table, "num_embeddings", None)
    if ids.is_floating_point():
        raise DataError(f"batch[{key!r}]: got {ids.dtype}, accepted is a tensor of whole numbers")
    if not isinstance(count, int) or not hfmodel.has_values(ids) or ids.numel() == 0:
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= count:
        raise DataError(f"batch[{key!r}]: id {low if low < 0 else high} is outside the model's vocabulary of {count}")
