"""Generation: the prompt's full segments run first, then tokens are decoded behind the memory, with a cache.

The cache holds the memory and the tokens of the segment under way. When that is full, it runs once more as a whole,
with the memory to write behind it, and a fresh cache begins with what was written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tightfit.core import hfmodel
from tightfit.core.tight import state_of
from tightfit.methods.recurrent_memory.reading import Request, first_memory
from tightfit.methods.recurrent_memory.recurrence import Recurrence


class Decoding:
    """One `generate` under way.

    Attributes:
        memory: (B, m, d) before the segment under way. tokens: (B, n) ids of it. cache: their keys and values.
    """

    def __init__(self, own: Recurrence):
        self.own = own
        self.memory: Tensor | None = None
        self.tokens: Tensor | None = None
        self.cache: Any = None

    def forward(self, model: nn.Module, reader: Any, stock: Any, call: dict[str, Any]) -> Any:
        """The model's output for the ids of this call, which follow those of the calls before."""
        ids, segment = call["input_ids"], self.own.settings.segment
        if self.memory is None:
            self.memory = first_memory(reader, ids.shape[0], reader.get_input_embeddings().weight)
            self.tokens = ids[:, :0]
        assert self.tokens is not None
        rest = torch.cat([self.tokens, ids], 1)
        if rest.shape[1] > segment:
            while rest.shape[1] > segment:
                self.memory, rest = self._read(reader, rest[:, :segment]), rest[:, segment:]
            self.tokens, self.cache, ids = rest[:, :0], None, rest
        request = Request(self.memory, begins=self.tokens.shape[1] == 0)
        self.own.request = request
        try:
            out = stock(
                input_ids=ids, attention_mask=None, past_key_values=self._cache(model), use_cache=True, return_dict=True
            )
        finally:
            self.own.request = None
        self.tokens = rest
        return out

    def _read(self, reader: Any, ids: Tensor) -> Tensor:
        """The memory behind a full segment."""
        request = Request(self.memory)  # type: ignore[arg-type]
        self.own.request = request
        try:
            reader(input_ids=ids, attention_mask=None, use_cache=False)
        finally:
            self.own.request = None
        assert request.written is not None
        return request.written

    def _cache(self, model: Any) -> Any:
        if self.cache is None:
            from transformers import DynamicCache

            self.cache = DynamicCache(config=model.config)
        return self.cache


class Rereading:
    """A `generate` that reads all tokens again for each new one: rows may end anywhere, and change places."""

    def __init__(self, own: Recurrence):
        self.own = own

    def forward(self, model: nn.Module, reader: Any, stock: Any, call: dict[str, Any]) -> Any:
        """The model's output for a whole call; positions are the segments' own."""
        own = {name: value for name, value in call.items() if name not in ("position_ids", "logits_to_keep")}
        return self.own.run(model, reader, stock, own, self.own.facts.head)


class Generates:
    """A language model whose `generate` knows of segments."""

    def generate(self, inputs: Any = None, generation_config: Any = None, **kwargs: Any) -> Any:
        own: Recurrence = state_of(self, Generates)["recurrence"]  # type: ignore[arg-type]
        ids = _checked(kwargs, generation_config, inputs if inputs is not None else kwargs.get("input_ids"))
        cached = _takes_cache(self, kwargs, generation_config, ids)
        if not cached:
            kwargs["use_cache"] = False
        own.decoding = Decoding(own) if cached else Rereading(own)
        try:
            return super().generate(inputs, generation_config, **kwargs)  # type: ignore[misc]
        finally:
            own.decoding = None


def _setting(name: str, default: Any, kwargs: dict[str, Any], *configs: Any) -> Any:
    """What `generate` goes by: the first of these that says something."""
    told = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
    return next((value for value in told if value is not None), default)


def _checked(kwargs: dict[str, Any], config: Any, ids: Any) -> Tensor:
    for name in ("past_key_values", "assistant_model", "prompt_lookup_num_tokens", "cache_implementation"):
        if _setting(name, None, kwargs, config) not in (None, "dynamic"):
            raise ValueError(
                f"RecurrentMemory: generate({name}=...) was given, but a cache holds one segment and its memory only; "
                f"leave it out"
            )
    if not torch.is_tensor(ids):
        raise ValueError("RecurrentMemory: generate() needs the prompt's input_ids")
    return ids


def _takes_cache(model: Any, kwargs: dict[str, Any], config: Any, ids: Tensor) -> bool:
    """Whether all rows reach the end of a segment at once, and stay in their places; else each step reads all again."""

    def setting(name: str, default: Any = None) -> Any:
        return _setting(name, default, kwargs, config, model.generation_config)

    if setting("use_cache") is False or setting("num_beams", 1) != 1:
        return False
    if setting("guidance_scale", 1) != 1:  # it calls the model for another prompt in between
        return False
    mask = kwargs.get("attention_mask")
    if mask is None:
        padding, ends = setting("pad_token_id"), setting("eos_token_id", ())
        # as generate itself makes out a mask
        told = padding is not None and padding not in ([ends] if isinstance(ends, int) else ends)
        mask = ids.ne(padding) if told else torch.ones_like(ids)
    return hfmodel.has_values(mask) and bool(mask.ne(0).all())
