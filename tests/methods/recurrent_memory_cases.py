"""Tiny models for the recurrent memory, and the obvious slow version of it: one row at a time, everything kept."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import transformers as hf
from models import VOCABULARY

import tightfit

SIZE = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
ROPE = {**SIZE, "num_key_value_heads": 1, "vocab_size": VOCABULARY, "max_position_embeddings": 64}
BERT = {**SIZE, "vocab_size": VOCABULARY, "max_position_embeddings": 64, "num_labels": 3, "pad_token_id": 0}
MODERN = {**BERT, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3, "local_attention": 4}
OPT = {
    "hidden_size": 24,
    "word_embed_proj_dim": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "ffn_dim": 32,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}
GPT2 = {"n_embd": 24, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": VOCABULARY, "pad_token_id": 0}
DISTIL = {"dim": 24, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "vocab_size": VOCABULARY, "num_labels": 3}
GEMMA = {**ROPE, "head_dim": 12, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}

DECODERS = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**ROPE)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2, bos_token_id=1, eos_token_id=1)),
    "opt": lambda: hf.OPTForCausalLM(hf.OPTConfig(**OPT)),
    "gpt-neox": lambda: hf.GPTNeoXForCausalLM(
        hf.GPTNeoXConfig(**SIZE, vocab_size=VOCABULARY, max_position_embeddings=64)
    ),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**ROPE, sliding_window=6)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**ROPE, head_dim=12)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**GEMMA)),
}
CLASSIFIERS = {
    "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**BERT)),
    "roberta": lambda: hf.RobertaForSequenceClassification(
        hf.RobertaConfig(**{**BERT, "pad_token_id": 1, "max_position_embeddings": 66})
    ),
    "distilbert": lambda: hf.DistilBertForSequenceClassification(hf.DistilBertConfig(**DISTIL)),
    "electra": lambda: hf.ElectraForSequenceClassification(hf.ElectraConfig(**BERT, embedding_size=24)),
    "modernbert": lambda: hf.ModernBertForSequenceClassification(hf.ModernBertConfig(**MODERN)),
    "modernbert-mean": lambda: hf.ModernBertForSequenceClassification(
        hf.ModernBertConfig(**MODERN, classifier_pooling="mean")
    ),
    "llama": lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**ROPE, num_labels=3, pad_token_id=0)),
}
TAGGERS = {
    "bert": lambda: hf.BertForTokenClassification(hf.BertConfig(**BERT)),
    "roberta-mlm": lambda: hf.RobertaForMaskedLM(
        hf.RobertaConfig(**{**BERT, "pad_token_id": 1, "max_position_embeddings": 66})
    ),
    "modernbert": lambda: hf.ModernBertForTokenClassification(hf.ModernBertConfig(**MODERN)),
    "llama": lambda: hf.LlamaForTokenClassification(hf.LlamaConfig(**ROPE, num_labels=3)),
}


def build(make, *, double=True, eager=False):
    """A seeded model without dropout, in training mode; its weights are large enough for gradients to be seen."""
    torch.manual_seed(0)
    model = make()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "dropout_p", "dropout_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    if eager:
        model.set_attn_implementation("eager")
    return (model.double() if double else model).train()


def batch(lengths=(17, 12, 4), *, seed=0, left=False, tags=None):
    """Ragged rows of ids, with labels for the next token, or `tags` of them for each."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(4, VOCABULARY, (len(lengths), width), generator=generator)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, width - length :] = 1
        if not left:
            mask[row] = mask[row].flip(0)
    ids = ids * mask
    labels = ids if tags is None else torch.randint(tags, ids.shape, generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels.masked_fill(mask == 0, -100)}


def applied(model, **fields):
    """The model with memory, its memory far from zero."""
    out = tightfit.apply(model, tightfit.RecurrentMemory(**fields))
    for name, parameter in model.named_parameters():
        if name.endswith("memory_tokens.weight"):
            with torch.no_grad():
                numbers = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
                parameter.copy_(numbers)
    return out


def memory_of(model):
    """The memory's parameter."""
    return next(p for n, p in model.named_parameters() if n.endswith("memory_tokens.weight"))


def gradients(model, *batches, scale=1.0):
    """Loss and gradients by name."""
    model.zero_grad()
    total = 0.0
    for given in batches:
        loss = model(**given).loss
        (loss * scale).backward()
        total += float(loss.detach())
    return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_close(found, wanted, limit=1e-12):
    """Loss and gradients."""
    assert abs(found[0] - wanted[0]) <= limit * max(abs(wanted[0]), 1.0)
    assert set(found[1]) == set(wanted[1])
    for name, gradient in wanted[1].items():
        gap = (found[1][name] - gradient).abs().max()
        assert gap <= limit * gradient.abs().max().clamp_min(1.0), f"{name}: {float(gap):.1e}"


# -- the slow version ----------------------------------------------------------------------------------------------


def _backbone(model):
    return model.base_model


def slow_decoder(model, memory, ids, segment, *, both_ways=True, cuts=()):
    """Logits (L, V) of one row and the memory behind it: a stock model, segment by segment, one row at a time."""
    slots, found = memory.shape[0], []
    state = memory[None]
    table = model.get_input_embeddings()
    for number, start in enumerate(range(0, len(ids), segment), 1):
        tokens = table(ids[None, start : start + segment])
        rows = torch.cat([state, tokens, state], 1)
        size = rows.shape[1]
        call = {"inputs_embeds": rows, "use_cache": False}
        if both_ways:
            seen = torch.ones(size, size).tril().bool()
            seen[:slots, :slots] = True
            seen[size - slots :, size - slots :] = True
            additive = torch.zeros(size, size, dtype=rows.dtype).masked_fill(~seen, -torch.inf)[None, None]
            call["attention_mask"] = additive
            call["position_ids"] = torch.arange(size)[None]
            window, kinds = getattr(model.config, "sliding_window", None), getattr(model.config, "layer_types", None)
            if window and (kinds is None or "sliding_attention" in kinds):
                far = torch.arange(size)[:, None] - torch.arange(size)[None] >= window
                near = additive.masked_fill(far, -torch.inf)
                both = {"full_attention": additive, "sliding_attention": near}
                call["attention_mask"] = both if kinds and len(set(kinds)) > 1 else near
        hidden = _backbone(model)(**call).last_hidden_state
        logits = model.get_output_embeddings()(hidden[:, slots : size - slots])
        found.append(logits[0])
        state = hidden[:, size - slots :]
        if number in cuts:
            state = state.detach()
    return torch.cat(found), state


def slow_encoder(model, memory, ids, segment, align):
    """Rows of the head's outputs for one row: [(columns, output of the model for them)], in order."""
    slots = memory.shape[0]
    text = len(ids) - 2
    table = model.get_input_embeddings()
    state, found = memory[None], []
    starts = list(range(0, text, segment)) if align == "left" else list(range(text - segment, -segment, -segment))[::-1]
    for start in starts or [0]:
        columns = torch.arange(max(start, 0), min(start + segment, text)) + 1
        tokens = table(ids[None])
        parts = [tokens[:, :1], state, tokens[:, -1:], tokens[:, columns], tokens[:, -1:]]
        rows = torch.cat(parts, 1)
        hidden = _backbone(model)(inputs_embeds=rows).last_hidden_state
        state = hidden[:, 1 : slots + 1]
        found.append((columns, torch.cat([hidden[:, :1], hidden[:, slots + 2 :]], 1)))
    return found


def cross_entropy(pairs):
    """Mean over all targets of (logits, targets) pairs."""
    logits, targets = (torch.cat(part) for part in zip(*pairs))
    return F.cross_entropy(logits, targets, ignore_index=-100)
