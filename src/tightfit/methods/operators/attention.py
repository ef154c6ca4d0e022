"""Switches a model's attention to the one that keeps q, k and v only."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import nn

from tightfit.core.edits import Edit, Handle
from tightfit.core.model_code import asks_for_sdpa
from tightfit.core.transform import Slot
from tightfit.ops.attention import attention, dropout_attention
from tightfit.ops.codec import Codec

STOCK = "sdpa"
OURS = "tightfit_sdpa"
_PLAIN = ("cache", "softcap", "output_attentions")


def supports(model: nn.Module) -> bool:
    """Whether the model takes its attention from transformers' registry, whatever its name, and runs torch's now."""
    backend = getattr(model, "_supports_attention_backend", False) or getattr(model, "_supports_sdpa", False)
    config: Any = getattr(model, "config", None)
    now = getattr(config, "_attn_implementation", None)
    return bool(backend) and now == STOCK and asks_for_sdpa(model.modules()) is None


def fused_sdpa(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, codec=None, **kwargs
):
    """transformers' sdpa attention; where a gradient is wanted, its probabilities and its output are not kept.

    Args:
        query: (B, H, L, D); key, value: (B, H_kv, S, D).
        codec: keeps these in its code.

    Returns:
        ((B, L, H, D), None), bit for bit what the stock function gives.
    """
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    def stock(q, k, v, mask):
        return sdpa_attention_forward(module, q, k, v, mask, dropout, scaling, is_causal, **kwargs)[0]

    codec, bias = codec if module.training else None, kwargs.get("position_bias")
    learns = bias is not None and bias.requires_grad
    needs = torch.is_grad_enabled() and (learns or any(t.requires_grad for t in (query, key, value)))
    learned = attention_mask is not None and attention_mask.requires_grad
    odd = any(kwargs.get(name) is not None and kwargs[name] is not False for name in _PLAIN)
    if not needs or learned or odd or torch.compiler.is_compiling():
        return stock(query, key, value, attention_mask), None
    if dropout in (0, 1) or query.device.type != "cpu":
        parameters = (bias,) if learns else ()
        options: dict[str, Any] = {"parameters": parameters, "random": dropout > 0, "codec": codec}
        return attention(stock, query, key, value, attention_mask, **options), None
    groups = query.shape[1] // key.shape[1]
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    causal = bool(causal) and query.shape[2] > 1 and attention_mask is None
    if attention_mask is not None:
        attention_mask = attention_mask[..., : key.shape[2]]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    shape: dict[str, Any] = {"scale": scaling, "causal": causal, "bias": bias}
    return dropout_attention(query, key, value, attention_mask, dropout, **shape, codec=codec), None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class AttentionEdit(Edit):
    """Set the model's attention implementation to the fused one, and set it back.

    Where two methods of a recipe do so, the one with a codec counts.
    """

    slot: Slot = Slot.OPERATORS
    codec: Codec | None = None
    label: str = ""

    @property
    def target(self) -> str:
        return "(attention)"

    def run(self, model: nn.Module) -> Handle:
        return _AttentionHandle(model, self.codec, OURS + self.label)


class _AttentionHandle(Handle):
    def __init__(self, model: Any, codec: Codec | None, name: str):
        from transformers import AttentionInterface
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

        AttentionInterface.register(name, functools.partial(fused_sdpa, codec=codec))
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[STOCK])  # or the mask is silently None
        self.changed: list[tuple[Any, str, str]] = []
        for config in {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values():
            now = getattr(config, "_attn_implementation_internal", None)
            if now == STOCK or (now == OURS and codec is not None):
                # `set_attn_implementation` would also check kernels
                config._attn_implementation_internal = name
                self.changed.append((config, now, name))

    def undo(self, model: Any) -> None:
        for config, before, name in reversed(self.changed):
            if config._attn_implementation_internal == name:
                config._attn_implementation_internal = before
