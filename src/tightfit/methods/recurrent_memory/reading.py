"""One segment through the model: the memory goes in with its tokens, and a new one comes out."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from tightfit.core import hfmodel
from tightfit.core.calls import argument_names
from tightfit.core.edit import Picker
from tightfit.core.tight import states_of
from tightfit.methods.recurrent_memory.facts import Facts
from tightfit.ops.autograd import autocast_dtype

CHILD = "memory_tokens"


class MemoryTokens(nn.Module):
    """The memory that a row begins with.

    Attributes:
        weight: (m, d).
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)


@dataclasses.dataclass
class Request:
    """What goes with one segment to the reader, and what comes back.

    Attributes:
        memory: (B, m, d) before the segment.
        counts: (B,) its real tokens, or None: all.
        begins: of a segment that is decoded with a cache, whether its memory still goes in front; None: of any other.
        behind: (B, 1) ids, or (B, 1, d) embeddings, of the token between an encoder's memory and its text.
        pooled: (B, 1) the column that a decoder's classifier reads, or None.
        written: (B, m, d) after the segment.
    """

    memory: Tensor
    counts: Tensor | None = None
    begins: bool | None = None
    behind: Tensor | None = None
    pooled: Tensor | None = None
    written: Tensor | None = None


def with_field(out: Any, **values: Any) -> Any:
    """A model's output with other fields, and without what belongs to one segment only."""
    dropped = ("past_key_values", "hidden_states", "attentions")
    fields = {f.name: getattr(out, f.name) for f in dataclasses.fields(out) if f.name not in dropped}
    return type(out)(**{**fields, **values})


def pickers(module: nn.Module) -> list[Picker]:
    """Those who leave tokens of this module's step out of its graph now."""
    if not (module.training and torch.is_grad_enabled()):
        return []
    found = [part for state in states_of(module) for part in state.values() if isinstance(part, Picker) and part.picks]
    return list(dict.fromkeys(found))


def read(reader: Any, stock: Any, call: dict[str, Any], request: Request, facts: Facts, *, both_ways: bool) -> Any:
    """The reader's output for a segment's own tokens; the memory behind it is left in the request."""
    call["return_dict"] = True
    if not request.memory.shape[1]:
        request.written = request.memory
        return stock(**call)
    if request.begins is False:
        return stock(**call)
    ids, embeds = call.pop("input_ids", None), call.pop("inputs_embeds", None)
    table = reader.get_input_embeddings()
    tokens = table(ids) if embeds is None else embeds
    frame = _framed if facts.framing else _surrounded
    return frame(table, stock, call, tokens, request, facts, both_ways, reader)


def _framed(table, stock, call, tokens, request, facts, both_ways, reader) -> Any:
    """An encoder's segment: class token, memory, separator, text, separator."""
    slots = request.memory.shape[1]
    behind = request.behind if request.behind.is_floating_point() else table(request.behind)
    parts = (tokens[:, :1], request.memory, behind, tokens[:, 1:])
    call["inputs_embeds"] = torch.cat(parts, 1)
    for name in ("attention_mask", "token_type_ids"):
        value = call.get(name)
        if value is not None:
            call[name] = torch.cat([value[:, :1], value[:, :1].expand(-1, slots + 1), value[:, 1:]], 1)
    mask = call.get("attention_mask")
    columns = torch.arange(1, slots + 1, device=tokens.device).expand(len(tokens), -1)
    real = torch.ones(call["inputs_embeds"].shape[:2], device=tokens.device) if mask is None else mask
    out, rows = picked(reader, stock, call, columns, columns, real.bool())
    hidden = out.last_hidden_state
    if rows is not None:
        request.written = _rows(hidden, rows)
        return out
    request.written = hidden[:, 1 : slots + 1].clone()  # not a view, which would keep all of it
    out.last_hidden_state = torch.cat([hidden[:, :1], hidden[:, slots + 2 :]], 1)
    return out


def _surrounded(table, stock, call, tokens, request, facts, both_ways, reader) -> Any:
    """A decoder's segment: memory to read, text, memory to write; padding comes last."""
    slots, width = request.memory.shape[1], tokens.shape[1]
    counts = request.counts
    memory = request.memory
    rows = torch.cat([memory, tokens] if request.begins else [memory, tokens, memory], 1)
    place = torch.arange(rows.shape[1], device=rows.device)
    if counts is not None:
        ends = counts[:, None] + slots
        # the memory to write follows the last real token, so that distances are those of the row alone
        order = torch.where(place < ends, place, place + width - counts[:, None])
        order = torch.where(place < ends + slots, order, place - slots)
        rows = rows.gather(1, order[..., None].expand_as(rows))
    call["inputs_embeds"] = rows
    types = call.get("token_type_ids")
    if types is not None:
        edges = types[:, :1].expand(-1, slots), types[:, -1:].expand(-1, slots)
        call["token_type_ids"] = torch.cat([edges[0], types, edges[1]], 1)
    call["attention_mask"] = None if counts is None else (place < ends + slots).long()
    if both_ways:
        call["attention_mask"] = masks(place, slots, width if counts is None else counts, rows, facts, reader)
        if "position_ids" in argument_names(reader):
            call["position_ids"] = place[None]
    behind = torch.full((len(rows), 1), slots + width, device=rows.device) if counts is None else ends
    written = behind + place[:slots]
    kept = torch.cat([place[:slots].expand(len(rows), -1), written], 1)
    if request.pooled is not None:
        kept = torch.cat([kept, slots + request.pooled], 1)
    out, found = picked(reader, stock, call, kept, written, place < behind + slots)
    hidden = out.last_hidden_state
    if found is not None:
        request.written = _rows(hidden, found)
        return out
    if counts is None:
        request.written = hidden[:, slots + width :].clone()
    elif not request.begins:
        request.written = _rows(hidden, written)
    if request.pooled is None or counts is None:
        out.last_hidden_state = hidden[:, slots : slots + width]
    else:  # a head that is told no ids, or knows none of padding, reads the last column
        out.last_hidden_state = _rows(hidden, slots + torch.minimum(place[:width], counts[:, None] - 1))
    return out


def picked(reader: Any, stock: Any, call: dict[str, Any], keep: Tensor, asked: Tensor, real: Tensor) -> Any:
    """The reader's output, where those who leave tokens out are told what to keep.

    Args:
        keep: (B, n) columns that must not be left out. asked: (B, m) columns that are looked for.
        real: (B, T) no padding.

    Returns:
        (output, (B, m) where the columns stand among the rows returned; None: where they were)
    """
    own = pickers(reader)
    for part in own:
        part.keep(keep, real)
    out = stock(**call)
    places = [where for part in own if (where := part.places(asked)) is not None]
    return out, places[0] if places else None


def _rows(hidden: Tensor, index: Tensor) -> Tensor:
    return hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[2]))


def masks(place: Tensor, slots: int, counts: Any, like: Tensor, facts: Facts, reader: nn.Module) -> Any:
    """What each token of a decoder's segment looks at: the memory to read and the one to write see themselves whole.

    Args:
        place: (T,) columns. slots: m. counts: tokens between the memories, an int or (B,).
        like: the rows, for their dtype.

    Returns:
        An additive mask (B or 1, 1, T, T), of models whose kinds of layers differ one for each kind.
    """
    ends = slots + (counts[:, None] if torch.is_tensor(counts) else counts)
    before = (place < slots).view(1, -1)
    inside = (place < ends + slots).view(-1, len(place))
    write = (place >= ends).view(-1, len(place)) & inside
    seen = place[:, None] >= place[None, :]
    seen = seen | (before[:, :, None] & before[:, None, :]) | (write[:, :, None] & write[:, None, :])
    seen = (seen & inside[:, None, :])[:, None]
    dtype = autocast_dtype(like.device.type) or like.dtype
    whole = additive(seen, dtype)
    if facts.sliding is None or len(place) <= facts.sliding:
        return whole
    near = additive(seen & (place[:, None] - place[None, :] < facts.sliding), dtype)
    return {"full_attention": whole, "sliding_attention": near} if facts.mixed else near


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a token is seen, and the lowest number elsewhere."""
    # kernels would turn a boolean mask into this, one copy for each layer
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)


def first_memory(reader: nn.Module, rows: int, like: Tensor) -> Tensor:
    """(B, m, d): the learnt memory for each row."""
    child = reader._modules.get(CHILD)
    if child is None:
        return like.new_zeros(rows, 0, like.shape[-1]) if like.is_floating_point() else torch.zeros(rows, 0, 1)
    weight: Any = child.weight
    return weight.expand(rows, *weight.shape)


def spread(reader: nn.Module) -> float | None:
    """The standard deviation of the token embeddings as the blocks get them; None where there are no values."""
    table: Any = reader.get_input_embeddings()  # type: ignore[operator]
    if not hfmodel.has_values(table.weight):
        return None
    scale = getattr(table, "scalar_embed_scale", None) or getattr(table, "embed_scale", None) or 1.0
    return float(table.weight.detach().float().std()) * float(scale)


def drawn(reader: nn.Module, slots: int, seed: int, spread: float | None) -> MemoryTokens:
    """Memory tokens, each drawn by itself with this spread; zeros where there is none, as nothing will be trained."""
    table: Any = reader.get_input_embeddings()  # type: ignore[operator]
    like = table.weight
    # the table may be held in fewer bits than the blocks compute in; their norms are not
    norms = (p.dtype for p in reader.parameters() if p.dim() == 1 and p.is_floating_point())
    dtype = next(norms, like.dtype if like.is_floating_point() else torch.get_default_dtype())
    weight = torch.zeros(slots, table.embedding_dim, dtype=dtype, device=like.device)
    if spread is None:
        return MemoryTokens(weight)
    numbers = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    return MemoryTokens((numbers * spread).to(weight))
