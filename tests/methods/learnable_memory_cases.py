"""The readable LearnableMemory: one joint forward of all tokens with a mask, written out for ViT and DeiT."""

from __future__ import annotations

import models
import torch
import torch.nn.functional as F
import transformers as hf


def vit(layers=3, **fields):
    """A seeded vision transformer in training mode, float64."""
    config = hf.ViTConfig(
        **{**models.SIZE, "num_hidden_layers": layers}, image_size=16, patch_size=8, num_labels=3, **fields
    )
    return models._seeded(lambda: hf.ViTForImageClassification(config), None).double()


def deit(layers=2):
    config = hf.DeiTConfig(**{**models.SIZE, "num_hidden_layers": layers}, image_size=16, patch_size=8, num_labels=3)
    model = models._seeded(lambda: hf.DeiTForImageClassification(config), None).double()
    for parameter in (model.deit.embeddings.cls_token, model.deit.embeddings.position_embeddings):
        torch.nn.init.normal_(parameter)  # zeros by default
    return model


def images(size=3, labels=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(size, 3, 16, 16, generator=generator, dtype=torch.double)
    return {"pixel_values": pixels, "labels": torch.randint(labels, (size,), generator=generator)}


def shaken(model, scale=0.5):
    """Large random values in whatever trains or is held, so that nothing is hidden by small memory."""
    generator = torch.Generator().manual_seed(5)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if "tight_" in name:
            tensor.data.normal_(0, scale, generator=generator)


def body(model):
    return model.vit if hasattr(model, "vit") else model.deit


def joint(model, pixels, tasks=(), visibility="concatenation", normed=True, shared=None):
    """(old logits, logits of each task), from one masked forward of all tokens.

    Args:
        tasks: names, each with its class token and memory; shared: a task whose memory all tokens see.
    """
    inner = body(model)
    y = inner.embeddings(pixels)
    old, place = y.shape[1], inner.embeddings.position_embeddings[:, :1]
    owned = [getattr(model.tight_tasks, f"task_{task}") for task in tasks]
    y = torch.cat([y, *((own.cls + place).expand(len(y), -1, -1) for own in owned)], 1)
    for block in inner.layers:
        rows = [getattr(block.tight_memory, f"task_{task}") for task in (*tasks, *([shared] if shared else []))]
        mask = _mask(old, [len(r) for r in rows], len(tasks), visibility == "extension")
        memory = torch.cat(rows)[None].expand(len(y), -1, -1) if rows else y[:, :0]
        q = block.layernorm_before(y)
        kv = torch.cat([q, block.layernorm_before(memory) if normed else memory], 1)
        out = _attention(block.attention, q, kv, mask)
        y = y + out
        y = y + block.mlp(block.layernorm_after(y))
    y = inner.layernorm(y)
    return model.classifier(y[:, 0]), [own.head(y[:, old + i]) for i, own in enumerate(owned)]


def _attention(module, q, kv, mask):
    heads, width = module.num_attention_heads, module.head_dim

    def split(x):
        return x.view(*x.shape[:2], heads, width).transpose(1, 2)

    scores = split(module.q_proj(q)) @ split(module.k_proj(kv)).mT / width**0.5
    shares = F.softmax(scores.masked_fill(~mask, -torch.inf), -1)
    return module.o_proj((shares @ split(module.v_proj(kv))).transpose(1, 2).flatten(2))


def _mask(old, sizes, tasks, extension):
    """(queries, keys): the table, cell by cell; keys are tokens, class tokens, then memory."""
    owners = [None] * old + list(range(tasks)) + [i if tasks else None for i, m in enumerate(sizes) for _ in range(m)]
    queries = [None] * old + list(range(tasks))

    def sees(query, key):
        if key is None:
            return True
        return query is not None and (query == key or (extension and key < query))

    return torch.tensor([[sees(q, k) for k in owners] for q in queries])
