"""Tiny models of many families, built from config; dropout is on where the family has it."""

from __future__ import annotations

import torch
import transformers as hf

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
VOCABULARY = 120


def _seeded(build, dropout: float | None):
    torch.manual_seed(0)
    model = build()
    if dropout is not None:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = dropout
            for name in ("dropout_p", "dropout_prob", "attention_dropout", "dropout"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, dropout)
    return model.train()


def bert(head="SequenceClassification", **kw):
    return getattr(hf, f"BertFor{head}")(hf.BertConfig(**SIZE, vocab_size=VOCABULARY, max_position_embeddings=64, **kw))


def roberta(head="SequenceClassification", **kw):
    config = hf.RobertaConfig(**SIZE, vocab_size=VOCABULARY, max_position_embeddings=66, pad_token_id=1, **kw)
    return getattr(hf, f"RobertaFor{head}")(config)


def gpt2(**kw):
    config = hf.GPT2Config(
        n_embd=32, n_layer=2, n_head=2, n_positions=64, vocab_size=VOCABULARY, bos_token_id=119, eos_token_id=119, **kw
    )
    return hf.GPT2LMHeadModel(config)


def llama(tied=False, **kw):
    config = hf.LlamaConfig(
        **SIZE, num_key_value_heads=1, vocab_size=VOCABULARY, max_position_embeddings=64, tie_word_embeddings=tied, **kw
    )
    return hf.LlamaForCausalLM(config)


def gemma2(**kw):
    config = hf.Gemma2Config(
        **SIZE, num_key_value_heads=1, head_dim=16, vocab_size=VOCABULARY, max_position_embeddings=64, **kw
    )
    return hf.Gemma2ForCausalLM(config)


def deepseek_sparse():
    """Its attention sees but the tokens that an indexer picks."""
    heads = {"qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "kv_lora_rank": 8, "q_lora_rank": 8}
    index = {"index_n_heads": 2, "index_head_dim": 8, "index_topk": 4}
    config = hf.DeepseekV32Config(
        **SIZE, **heads, **index, num_key_value_heads=2, first_k_dense_replace=2, vocab_size=VOCABULARY
    )
    return hf.DeepseekV32ForCausalLM(config)


def t5(**kw):
    config = hf.T5Config(
        d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, vocab_size=VOCABULARY, decoder_start_token_id=0, **kw
    )
    return hf.T5ForConditionalGeneration(config)


def bart(**kw):
    config = hf.BartConfig(
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        **kw,
    )
    model = hf.BartForConditionalGeneration(config)
    model.final_logits_bias.normal_()
    return model


def vit(**kw):
    return hf.ViTForImageClassification(hf.ViTConfig(**SIZE, image_size=16, patch_size=8, num_labels=3, **kw))


IMAGES = {"vit": vit}

FAMILIES = {
    "bert": bert,
    "bert-mlm": lambda: bert("MaskedLM"),
    "roberta": roberta,
    "roberta-mlm": lambda: roberta("MaskedLM"),
    "gpt2": gpt2,
    "llama": llama,
    "llama-tied": lambda: llama(tied=True),
    "gemma2": gemma2,
    "t5": t5,
    "bart": bart,
}


def build(family: str, *, dropout: float | None = None) -> torch.nn.Module:
    """A fresh, seeded model of the family in training mode; `dropout` overrides every dropout rate."""
    return _seeded({**FAMILIES, **IMAGES}[family], dropout)


def kept_ids(model: torch.nn.Module) -> tuple[int, ...]:
    """Ids that test batches draw from, with the ids the configs name; few of them stand at their own row."""
    return (0, 1, 2, *range(9, 66), 102, 119)


def batch(model, *, size: int = 3, length: int = 9, seed: int = 0, ids=None) -> dict[str, torch.Tensor]:
    """A ragged batch with labels for the model's task, drawn from `kept_ids` or `ids`."""
    generator = torch.Generator().manual_seed(seed)
    if "ImageClassification" in type(model).__name__:
        side = model.config.image_size
        pixels = torch.randn(size, model.config.num_channels, side, side, generator=generator)
        labels = torch.randint(model.config.num_labels, (size,), generator=generator)
        return {"pixel_values": pixels, "labels": labels}
    pool = torch.tensor([i for i in (ids or kept_ids(model)) if i > 3])
    tokens = pool[torch.randint(len(pool), (size, length), generator=generator)]
    mask = torch.ones_like(tokens)
    pad = model.config.pad_token_id
    for row in range(1, size):
        mask[row, length - row :] = 0
        tokens[row, length - row :] = pad if pad is not None else 0
    out = {"input_ids": tokens, "attention_mask": mask}
    name = type(model).__name__
    if "SequenceClassification" in name:
        out["labels"] = torch.randint(model.config.num_labels, (size,), generator=generator)
    else:
        out["labels"] = tokens.masked_fill(mask == 0, -100)
    return out
