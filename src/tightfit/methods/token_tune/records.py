"""What the attention does under token selection: a record travels with the call and is asked in every attention."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tightfit.core.errors import UnsupportedModelError
from tightfit.methods.token_tune.policies import Selection
from tightfit.ops.attention import attention
from tightfit.ops.overwrite import overwrite
from tightfit.ops.own_key import own_key, own_probability

KEY = "tightfit_tokens"
"""Name of the keyword argument under which a record goes through the model to its attention."""

CROSS = ("cross", "encoder_attn", "encdec")

Attend = Callable[..., tuple[Tensor, Any]]


def token_attention(module, query, key, value, attention_mask, *, base: str, **kwargs):
    """An attention function of transformers' registry that asks the call's record, or goes on as `base` would.

    Args:
        query: (B, H, L, D); key, value: (B, H_kv, S, D).
        base: name of the attention implementation underneath.

    Returns:
        ((B, L, H, D), weights or None)
    """
    record = kwargs.pop(KEY, None)
    call = implementation(base, module)
    if record is None:
        return call(module, query, key, value, attention_mask, **kwargs)
    return record.attend(call, module, query, key, value, attention_mask, kwargs)


def implementation(name: str, module: nn.Module) -> Attend:
    """The registered attention of that name; "eager" lives beside the module's own class."""
    from transformers import AttentionInterface

    if name == "eager":
        for cls in type(module).__mro__:
            found = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
            if found is not None:
                return found
    if name == "sdpa":
        return _grouped_sdpa
    return AttentionInterface._global_mapping[name]


def _grouped_sdpa(module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **kwargs):
    """transformers' sdpa attention, but for this: with a mask it keeps grouped keys and values as they are."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    grouped = attention_mask is not None and query.shape[1] != key.shape[1]
    if not grouped or not torch.is_grad_enabled() or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)
    if query.device.type == "cpu":
        sdpa = nn.functional.scaled_dot_product_attention
        out = sdpa(query, key, value, attention_mask, dropout, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None

    def stock(q, k, v, mask):
        return sdpa_attention_forward(module, q, k, v, mask, dropout, scaling, is_causal, **kwargs)[0]

    # elsewhere no kernel takes a mask and grouped heads: they are repeated, and repeated again in backward
    return attention(stock, query, key, value, attention_mask, random=dropout > 0), None


def is_cross(module: nn.Module, names: dict[nn.Module, str]) -> bool:
    """Whether an attention module reads another sequence than its queries come from."""
    last = names.get(module, "").lower()
    return any(part in last for part in CROSS)


class Grouped:
    """Attention as it is, but for grouped heads, which stay grouped."""

    def attend(self, call: Attend, module, query, key, value, mask, kwargs):
        return call(module, query, key, value, mask, **kwargs)


class Capture:
    """Notes the keys, the values and the mask of every attention of a forward without gradients.

    Attributes:
        kv: attention module -> (keys, values), each (B, H_kv, L, D), after rotary embedding, heads not repeated.
        masks: attention module -> (what it was given as a mask, whether it is causal without one).
        length: tokens per row. reached: attention modules that asked.
        updates: (B, L) what blocks have added to a token's residual stream, squared and summed, or None.
    """

    def __init__(self, names: dict[nn.Module, str]):
        self.names = names
        self.kv: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self.masks: dict[nn.Module, tuple[Tensor | None, bool]] = {}
        self.length = self.reached = 0
        self.updates: Tensor | None = None

    def attend(self, call: Attend, module, query, key, value, mask, kwargs):
        given = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if given is None else given
        self.masks[module] = (mask, bool(causal) and mask is None and query.shape[2] > 1)
        if not is_cross(module, self.names):
            if module in self.kv:
                raise UnsupportedModelError(
                    f"TokenTune: {type(module).__name__} runs more than once in one forward (blocks that share their "
                    f"weights); its keys and values cannot be told apart"
                )
            self.kv[module] = (_alone(key), _alone(value))
            self.length, self.reached = key.shape[2], self.reached + 1
        return call(module, query, key, value, mask, **kwargs)

    def add_update(self, before: Tensor, after: Tensor) -> None:
        """Count what a block added to the residual stream (B, L, d)."""
        norms = (after - before).float().square().sum(-1)
        self.updates = norms if self.updates is None else self.updates + norms


class Replay:
    """Attention of the selected rows to the captured keys and values, their own put in place of the captured ones.

    Args:
        capture: what was captured.
        selection: the rows.
        factor: (B, K) that gradients of keys and values from other tokens' queries are multiplied with, or None.
        keep: blocks will run again in backward, so what was captured stays.
    """

    def __init__(self, capture: Capture, selection: Selection, factor: Tensor | None = None, *, keep: bool = False):
        self.capture, self.selection, self.factor, self.keep = capture, selection, factor, keep
        self.rows: dict[tuple, tuple[Tensor | None, Tensor | None]] = {}

    def attend(self, call: Attend, module, query, key, value, mask, kwargs):
        if torch.is_tensor(mask) and mask.requires_grad:
            raise UnsupportedModelError(
                f"TokenTune: {type(module).__name__} is not supported: what it adds to its attention is learned, and "
                f"would not train, since the selected tokens take their part of the whole model's"
            )
        rows = self.mask_rows(module, query.dtype)
        kwargs["is_causal"] = False
        if is_cross(module, self.capture.names):
            return call(module, query, key, value, rows, **kwargs)
        stored = self.capture.kv[module] if self.keep else self.capture.kv.pop(module)
        where = (self.selection.positions, self.selection.valid, self.factor)
        keys, values = overwrite(stored[0], key, *where), overwrite(stored[1], value, *where)
        del stored
        out, weights = call(module, query, keys, values, rows, **kwargs)
        if self.factor is not None:
            scaling = kwargs.get("scaling")
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            own = own_probability(query.detach(), keys.detach(), rows, self.selection.positions, scale)
            out = own_key(out, query.detach(), key, value, own, self.factor, scale)
        return out, weights

    def mask_rows(self, module: nn.Module, dtype: torch.dtype) -> Tensor | None:
        """The rows of the captured mask, (B, 1 or H, K, S) and additive; made once for all modules that share it."""
        mask, causal = self.capture.masks[module]
        key = (id(mask), causal, dtype)
        if key not in self.rows:
            self.rows[key] = (mask, self._made(mask, causal, dtype))
        return self.rows[key][1]

    def _made(self, mask: Tensor | None, causal: bool, dtype: torch.dtype) -> Tensor | None:
        positions = self.selection.positions
        if mask is None:
            if not causal:
                return None
            allowed = torch.arange(self.capture.length, device=positions.device) <= positions[:, None, :, None]
        elif mask.shape[2] == 1:  # all tokens look at the same ones
            allowed = mask
        else:
            batch, count = positions.shape
            index = positions[:, None, :, None].expand(batch, mask.shape[1], count, mask.shape[3])
            allowed = mask.expand(batch, -1, -1, -1).gather(2, index)
        if allowed.dtype != torch.bool:
            return allowed
        # kernels turn a boolean mask into this, one copy for each layer
        return torch.zeros_like(allowed, dtype=dtype).masked_fill_(~allowed, -torch.inf)


def _alone(t: Tensor) -> Tensor:
    """The tensor, copied where it would keep a larger memory alive (a part of a joint projection)."""
    own = t.numel() * t.element_size()  # the compiler has no t.nbytes
    return t if t.untyped_storage().nbytes() <= own else t.clone(memory_format=torch.contiguous_format)
