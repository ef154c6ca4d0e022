"""Architectures, batches and the obvious slow reference for the tests of TokenTune."""

from __future__ import annotations

import contextlib

import torch
import transformers as hf
from torch.nn import functional

VOCABULARY = 50
SIZE = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 24}
TEXT = {**SIZE, "vocab_size": VOCABULARY, "max_position_embeddings": 32}
DECODER = {**TEXT, "num_key_value_heads": 2, "pad_token_id": 0}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _modernbert(head):
    config = hf.ModernBertConfig(
        **TEXT,
        pad_token_id=0,
        cls_token_id=1,
        sep_token_id=2,
        global_attn_every_n_layers=2,
        local_attention=6,
        classifier_pooling="mean",
        num_labels=3,
    )
    return getattr(hf, f"ModernBertFor{head}")(config)


def _distilbert():
    config = hf.DistilBertConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=32,
        dim=16,
        n_layers=3,
        n_heads=4,
        hidden_dim=24,
        dropout=0.0,
        attention_dropout=0.0,
        seq_classif_dropout=0.0,
        num_labels=3,
    )
    return hf.DistilBertForSequenceClassification(config)


def _roberta():
    config = hf.RobertaConfig(**{**TEXT, "max_position_embeddings": 34}, **NO_DROPOUT, pad_token_id=1, num_labels=3)
    return hf.RobertaForTokenClassification(config)


def _gpt2():
    drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(n_embd=16, n_layer=3, n_head=4, n_positions=32, vocab_size=VOCABULARY, pad_token_id=0, **drop)
    )


def _opt():
    config = hf.OPTConfig(
        **{k: v for k, v in TEXT.items() if k != "intermediate_size"},
        ffn_dim=24,
        word_embed_proj_dim=16,
        dropout=0.0,
        pad_token_id=0,
    )
    return hf.OPTForCausalLM(config)


def _neox():
    return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**TEXT, hidden_dropout=0.0, attention_dropout=0.0, pad_token_id=0))


def _gemma3():
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    config = hf.Gemma3TextConfig(**DECODER, head_dim=8, sliding_window=4, layer_types=types)
    return hf.Gemma3ForCausalLM(config)


def _qwen3_moe():
    config = hf.Qwen3MoeConfig(
        **DECODER, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12, output_router_logits=True
    )
    config._experts_implementation = "eager"
    return hf.Qwen3MoeForCausalLM(config)


def _bart():
    config = hf.BartConfig(
        d_model=16,
        encoder_layers=2,
        decoder_layers=3,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=32,
        dropout=0.0,
        pad_token_id=0,
    )
    return hf.BartForConditionalGeneration(config)


def _vit():
    return hf.ViTForImageClassification(hf.ViTConfig(**SIZE, **NO_DROPOUT, image_size=12, patch_size=4, num_labels=3))


def _beit():
    config = hf.BeitConfig(**SIZE, **NO_DROPOUT, image_size=12, patch_size=4, drop_path_rate=0.0, num_labels=3)
    return hf.BeitForImageClassification(config)


def _bert(head, **kw):
    return getattr(hf, f"BertFor{head}")(hf.BertConfig(**TEXT, **NO_DROPOUT, num_labels=3, **kw))


ARCHITECTURES = {
    "bert": lambda: _bert("MaskedLM"),
    "bert-class": lambda: _bert("SequenceClassification"),
    "bert-span": lambda: hf.BertForQuestionAnswering(hf.BertConfig(**TEXT, **NO_DROPOUT)),
    "roberta": _roberta,
    "distilbert": _distilbert,
    "modernbert": lambda: _modernbert("SequenceClassification"),
    "electra": lambda: hf.ElectraForTokenClassification(
        hf.ElectraConfig(**TEXT, **NO_DROPOUT, embedding_size=8, num_labels=3)
    ),
    "gpt2": _gpt2,
    "opt": _opt,
    "gpt-neox": _neox,
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER)),
    "llama-class": lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**DECODER, num_labels=3)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**DECODER, sliding_window=4)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**DECODER, head_dim=8)),
    "gemma3": _gemma3,
    "qwen3-moe": _qwen3_moe,
    "vit": _vit,
    "beit": _beit,
    "bart": _bart,
}
DECODERS = ("gpt2", "opt", "gpt-neox", "llama", "mistral", "qwen3", "gemma3", "qwen3-moe")
IMAGES = ("vit", "beit")
LENGTH, IMAGE_TOKENS = 10, 10


@contextlib.contextmanager
def doubles():
    """Stock code computes some things in float32 whatever the weights are; here they stay in float64."""
    to, single, type_as, softmax = torch.Tensor.to, torch.Tensor.float, torch.Tensor.type_as, functional.softmax

    def is_narrowing(t, *dtypes):
        return t.dtype == torch.float64 and torch.float32 in [d for d in dtypes if isinstance(d, torch.dtype)]

    def own_to(self, *args, **kwargs):
        return self if is_narrowing(self, *args, kwargs.get("dtype")) else to(self, *args, **kwargs)

    def own_softmax(x, dim=None, *args, dtype=None, **kwargs):
        return softmax(x, dim, *args, dtype=None if is_narrowing(x, dtype) else dtype, **kwargs)

    torch.Tensor.to = own_to
    torch.Tensor.float = lambda self: self if self.dtype == torch.float64 else single(self)
    torch.Tensor.type_as = lambda self, other: self if is_narrowing(self, other.dtype) else type_as(self, other)
    functional.softmax = own_softmax
    try:
        yield
    finally:
        torch.Tensor.to, torch.Tensor.float, torch.Tensor.type_as = to, single, type_as
        functional.softmax = softmax


def build(name: str) -> torch.nn.Module:
    """A fresh seeded model in float64 and training mode, with weights large enough for attention to matter."""
    torch.manual_seed(0)
    model = ARCHITECTURES[name]().double().train()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15, generator=generator)
            else:
                parameter.add_(torch.empty_like(parameter).normal_(0, 0.05, generator=generator))
    return model


def batch(model, padding: str | None = "right", seed: int = 0, rows: int = 3, length: int = LENGTH) -> dict:
    """A batch with labels; `padding` is "right", "left" or None (no mask at all)."""
    generator = torch.Generator().manual_seed(seed)
    name = type(model).__name__
    if "Image" in name:
        pixels = torch.randn(rows, 3, 12, 12, generator=generator, dtype=torch.float64)
        return {"pixel_values": pixels, "labels": torch.randint(3, (rows,), generator=generator)}
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    if padding:
        for row in range(1, rows):
            mask[row, length - row :] = 0
        mask = mask.flip(1) if padding == "left" else mask
        ids = ids.masked_fill(mask == 0, model.config.pad_token_id or 0)
    out = {"input_ids": ids} | ({"attention_mask": mask} if padding else {})
    if "QuestionAnswering" in name:
        return out | {"start_positions": torch.tensor([1] * rows), "end_positions": torch.tensor([3] * rows)}
    if "SequenceClassification" in name:
        return out | {"labels": torch.randint(3, (rows,), generator=generator)}
    classes = 3 if "TokenClassification" in name else VOCABULARY
    labels = torch.randint(classes, (rows, length), generator=generator)
    labels = labels.masked_fill(mask == 0, -100)
    if "Conditional" not in name:
        labels[:, 2] = -100
    return out | {"labels": labels}


def real(model, inputs: dict) -> torch.Tensor:
    """(B, L): the tokens of a batch that are no padding, on the side that is selected from."""
    if "pixel_values" in inputs:
        return torch.ones(inputs["pixel_values"].shape[0], IMAGE_TOKENS, dtype=torch.bool)
    if "Conditional" in type(model).__name__:
        return inputs["labels"] != -100
    return inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()


def positions(model, inputs: dict, count: int = 4, seed: int = 3) -> torch.Tensor:
    """(B, count) random real positions, of different number in different rows; the first and last real ones are in."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.full((len(real(model, inputs)), count), -1)
    for b, row in enumerate(real(model, inputs)):
        places = row.nonzero().flatten()
        inner = places[1:-1][torch.randperm(len(places) - 2, generator=generator)]
        if "start_positions" in inputs:
            inner = torch.tensor([inputs["start_positions"][b], inputs["end_positions"][b]])
        picked = torch.cat([places[:1], places[-1:], inner])[: count if b == 0 else count - 1]
        if "start_positions" in inputs:
            picked = torch.cat([places[:1], places[-1:], inner])
        out[b, : len(picked)] = picked
    return out


def selected(pos: torch.Tensor, length: int) -> torch.Tensor:
    """(B, L) mask of the positions."""
    mask = torch.zeros(pos.shape[0], length + 1, dtype=torch.bool)
    return mask.scatter(1, torch.where(pos < 0, length, pos), True)[:, :length]


def _stop(h: torch.Tensor, sel: torch.Tensor) -> torch.Tensor:
    """h (B, ..., L, d) with gradients at the selected tokens only."""
    return torch.where(sel.view(sel.shape[0], *[1] * (h.dim() - 3), -1, 1), h, h.detach())


def runner_of(model):
    """The module whose tokens are selected."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    base = inner.base_model
    return base.decoder if "Conditional" in type(inner).__name__ else base


@contextlib.contextmanager
def stopped(model, sel: torch.Tensor):
    """Stock calls inside have the reference's gradients: tokens outside `sel` are constants at every depth."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    runner = runner_of(model)
    inside = set(runner.modules())
    names = {m: n for n, m in runner.named_modules()}

    def attend(module, query, key, value, mask, *args, **kwargs):
        if module in inside and "encoder_attn" not in names[module]:
            key, value = _stop(key, sel), _stop(value, sel)
        return sdpa_attention_forward(module, query, key, value, mask, *args, **kwargs)

    AttentionInterface.register("stopped", attend)
    AttentionMaskInterface.register("stopped", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    blocks = next(m for m in runner.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 3)
    hooks = [blocks[0].register_forward_pre_hook(lambda m, a, k: ((_stop(a[0], sel), *a[1:]), k), with_kwargs=True)]

    def after(module, args, out):
        return (_stop(out[0], sel), *out[1:]) if isinstance(out, tuple) else _stop(out, sel)

    hooks += [block.register_forward_hook(after) for block in blocks]
    hooks.append(runner.register_forward_hook(lambda m, a, out: _replace(out, sel)))
    before = model.config._attn_implementation
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation_internal = "stopped"
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module in model.modules():
            if hasattr(module, "config"):
                module.config._attn_implementation_internal = before


def _replace(out, sel):
    out.last_hidden_state = _stop(out.last_hidden_state, sel)
    return out


def reference_loss(model, inputs: dict, pos: torch.Tensor) -> torch.Tensor:
    """The loss over the selected tokens, by explicit detaching of all others."""
    length = real(model, inputs).shape[1]
    sel = selected(pos, length)
    name = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
    labels = inputs.get("labels")
    per_token = labels is not None and labels.dim() == 2
    with stopped(model, sel):
        if not per_token:
            return model(**inputs).loss
        call = {k: v for k, v in inputs.items() if k != "labels"}
        if "Conditional" in name:
            call["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
        out = model(**call, use_cache=False) if "use_cache" in model.forward.__code__.co_varnames else model(**call)
    if "CausalLM" in name or "LMHead" in name:
        labels = functional.pad(labels, (0, 1), value=-100)[:, 1:]
    labels = labels.masked_fill(~sel, -100)
    loss = functional.cross_entropy(out.logits.flatten(0, 1), labels.flatten())
    if getattr(out, "router_logits", None):
        loss = loss + model.router_aux_loss_coef * _balance(model, out.router_logits, sel, inputs.get("attention_mask"))
    return loss


def _balance(model, logits, sel, mask):
    """The balance loss, in which the routers of unselected tokens are constants."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    stopped_ones = tuple(_stop(row.view(*sel.shape, -1), sel).flatten(0, 1) for row in logits)
    return load_balancing_loss_func(stopped_ones, model.num_experts, model.num_experts_per_tok, mask)


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients by name; zeros where there is none."""
    model.zero_grad()
    loss.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def gap(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest difference, relative to the largest gradient."""
    assert set(a) == set(b)
    scale = max(float(g.abs().max()) for g in b.values())
    return max(float((a[n] - b[n]).abs().max()) for n in b) / scale
