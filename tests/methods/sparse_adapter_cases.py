"""What the tests of SparseAdapter share: models, and the same adapter with everything on the device."""

from __future__ import annotations

import inspect

import models
import torch
import transformers as hf

import tightfit
from tightfit import SparseAdapter
from tightfit.ops.rows import attention_masks, masked_rows
from tightfit.ops.sparse_rows import reference as ref


def opt(**kw):
    config = hf.OPTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=64,
        word_embed_proj_dim=32,
        vocab_size=models.VOCABULARY,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    return hf.OPTForCausalLM(config)


FAMILIES = ("llama", "gpt2", "opt", "bert", "t5")


def build(family, dtype=torch.float32):
    model = opt() if family == "opt" else models.build(family)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "dropout_p", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model.train().to(dtype)


def applied(family="llama", dtype=torch.float32, spread=0.3, rows_dtype=None, **fields):
    """A model with an adapter whose values are not zero any more (unless spread is)."""
    model = build(family, dtype)
    fields = {"width": 48, "top_k": 5, "dtype": rows_dtype, **fields}
    found = tightfit.apply(model, SparseAdapter(**fields))
    part = SparseAdapter.of(found)
    generator = torch.Generator().manual_seed(5)
    for layer in part.layers:
        for tensor in (layer.bank.keys, layer.bank.values):
            if spread:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * spread)
        layer.bank.refresh()
        layer.start_router()
    return model, found, part


class Dense(torch.nn.Module):
    """The whole adapter as parameters, with masks instead of moving rows."""

    def __init__(self, layer, cap=None):
        super().__init__()
        self.keys = torch.nn.Parameter(layer.bank.keys.clone())
        self.values = torch.nn.Parameter(layer.bank.values.clone())
        self.settings, self.cap = layer.settings, cap
        self.mask, self.chosen = None, None

    def forward(self, h):
        flat, settings = h.reshape(-1, h.shape[-1]), self.settings
        keys = self.keys.detach()
        if settings.groups == 1:
            chosen = ref.top_rows(flat.detach(), keys, settings.top_k)
        else:
            logits = flat.detach() @ keys.view(settings.groups, -1, keys.shape[1]).mean(1).t()
            chosen = ref.top_rows_of_groups(flat.detach(), keys, settings.top_k, logits, settings.probe)
        with attention_masks(self.mask):
            seen = masked_rows(len(flat))
        if seen is not None:
            chosen &= (seen > 0.5)[:, None]
        if settings.selection == "union":
            chosen = chosen.any(0).expand_as(chosen)
        if self.cap is not None:
            chosen = ref.capped(chosen, flat.detach() @ keys.t(), self.cap)
        self.chosen = chosen
        out = ref.sparse_rows(flat, self.keys, self.values, chosen, settings.scale)
        return out.view(h.shape)


def dense(family, part, dtype=torch.float32, cap=None):
    """The stock model, frozen but for its head, with a `Dense` beside each MLP that `part` stands beside."""
    model = build(family, dtype)
    for name in SparseAdapter().freezes(model):
        model.get_parameter(name).requires_grad_(False)
    beside = torch.nn.ModuleList(Dense(layer, cap) for layer in part.layers)
    held = []

    def note(own):
        def hook(module, args, kwargs):
            call = inspect.signature(module.forward).bind(*args, **kwargs).arguments
            own.mask = call.get("attention_mask")

        return hook

    def take(module, args):
        held.append(args[0])

    for own, mlp in zip(beside, part.mlps):
        model.get_submodule(mlp.block).register_forward_pre_hook(note(own), with_kwargs=True)
        model.get_submodule(mlp.up).register_forward_pre_hook(take)
        model.get_submodule(mlp.down).register_forward_hook(lambda module, args, out, own=own: out + own(held.pop()))
    return model, beside
