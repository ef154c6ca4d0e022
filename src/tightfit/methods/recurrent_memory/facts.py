"""What a model must be like to carry memory tokens, decided by structure."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from torch import nn

from tightfit.core import hfmodel
from tightfit.core.batch import positions
from tightfit.core.errors import UnsupportedModelError
from tightfit.core.simulate.batches import task_of


@dataclasses.dataclass(frozen=True)
class Facts:
    """How a model takes and gives back tokens.

    Attributes:
        reader: name of the innermost module that takes the model's inputs.
        head: what has a target: "causal" (the next token), "token" (each token), "pooled" (a row), "hidden" (nothing).
        causal: tokens look at earlier ones only: a decoder.
        window: tokens that fit into one call, or None where nothing says so.
        width: of an embedding, and of a hidden state.
        padding: id that stands for no token, or None.
        sliding: tokens that a sliding layer looks back at, or None.
        mixed: sliding layers and others take turns, and each kind takes a mask of its own.
        shifts: the target of a token is the next one's label.
    """

    reader: str
    head: str
    causal: bool
    window: int | None
    width: int
    padding: int | None
    sliding: int | None
    mixed: bool
    shifts: bool

    @property
    def framing(self) -> int:
        """Tokens of a row that stand in front of and behind its text: an encoder's class token and separator."""
        return 0 if self.causal else 2


def facts_of(model: nn.Module) -> Facts:
    """Find out, or refuse.

    Raises:
        UnsupportedModelError: an encoder-decoder, no text model, a task whose outputs span segments, or embeddings of
            another width than hidden states. Names the reason.
    """
    hfmodel.refuse_prompts("RecurrentMemory", model)
    config: Any = hfmodel.text_config(model)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise _refused(model, "it is an encoder-decoder; memory is carried through decoders and encoders")
    name, reader = hfmodel.reader(model)
    parameters = inspect.signature(reader.forward).parameters
    if not {"input_ids", "inputs_embeds", "attention_mask"} <= set(parameters) or "pixel_values" in parameters:
        raise _refused(model, f"{type(reader).__name__} does not take text as input_ids or inputs_embeds")
    if getattr(config, "output_router_logits", False):
        raise _refused(
            model, "output_router_logits is on, and its balance loss would be added for every segment; switch it off"
        )
    if hfmodel.embeds_in_blocks(config) or hfmodel.embeddings_with_mask(reader) is not None:
        raise _refused(
            model, "it makes more of input_ids than their embeddings, and a segment is read as embeddings with memory"
        )
    table: Any = _table(reader)
    width = int(config.hidden_size)
    if table is None:
        raise _refused(model, "it has no plain table of token embeddings, into which memory could be put")
    if table.embedding_dim != width:
        raise _refused(
            model,
            f"its embeddings are {table.embedding_dim} wide and its hidden states {width}, so a hidden state cannot "
            f"stand in for an embedding",
        )
    sides = {getattr(m, "is_causal", None) for m in reader.modules()} & {True, False}
    if not sides:
        raise _refused(model, "its attention does not say whether it is causal")
    causal = True in sides
    kinds = {str(k) for k in getattr(config, "layer_types", None) or ()}
    sliding = getattr(config, "sliding_window", None) if causal else None
    if kinds and "sliding_attention" not in kinds:
        sliding = None
    limit = positions(model)
    head = _head(model, causal)
    return Facts(
        reader=name,
        head=head,
        causal=causal,
        window=limit if limit is not None else getattr(config, "max_position_embeddings", None),
        width=width,
        padding=getattr(config, "pad_token_id", None),
        sliding=sliding,
        mixed=len(kinds) > 1,
        shifts=head == "causal" and hfmodel.shifts_labels(model),
    )


def _table(reader: Any) -> nn.Module | None:
    try:
        table = reader.get_input_embeddings()
    except NotImplementedError:
        return None
    return table if hasattr(table, "embedding_dim") else None


def _head(model: nn.Module, causal: bool) -> str:
    task = task_of(model)
    inner = hfmodel.without_peft(model)
    if task == "lm":
        return "causal" if causal and not type(inner).__name__.endswith("ForMaskedLM") else "token"
    if task is None and hfmodel.backbone(model)[1] is model:
        return "hidden"
    known = {"sequence": "pooled", "token": "token"}
    if task not in known:
        raise _refused(
            model, "its head is none of a language model's, a sequence classifier's and a token classifier's"
        )
    return known[task]


def check_masks(model: nn.Module) -> None:
    """Raise where memory tokens cannot be given an attention of their own.

    Raises:
        UnsupportedModelError: layers without attention, attention that takes no mask for each pair of tokens.
    """
    config: Any = hfmodel.text_config(model)
    odd = sorted({str(k) for k in getattr(config, "layer_types", None) or ()} - {"full_attention", "sliding_attention"})
    now = getattr(config, "_attn_implementation", None) or ""
    reason = None
    if odd:
        reason = f"it has layers of type {', '.join(odd)}"
    elif "sdpa" not in now and "eager" not in now:
        reason = f"its attention {now!r} takes no mask for each pair of tokens (load it with sdpa or eager)"
    elif getattr(config, "alibi", False) is True:
        reason = "its attention adds ALiBi, which is made from the padding mask"
    elif not (getattr(model, "_supports_attention_backend", False) or getattr(model, "_supports_sdpa", False)):
        reason = "it does not take its attention from transformers' attention registry"
    if reason:
        raise _refused(model, f"memory slots cannot see each other both ways: {reason}; use attention='causal'")


def _refused(model: nn.Module, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"RecurrentMemory: {type(model).__name__} is not supported: {reason}")
