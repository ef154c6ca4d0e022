"""A tiny model of any family that transformers has, where its config takes small sizes, and a ragged batch for it."""

from __future__ import annotations

import torch
import transformers as hf
from transformers.models.auto import modeling_auto as auto

LAYERS = 4
SIZES = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "lru_width", "embedding_size", "word_embed_proj_dim"), 32
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers"), LAYERS),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "d_ff", "hidden_dim", "ffn_dim", "n_inner", "ffn_hidden_size"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok"), 4),
    **dict.fromkeys(("head_dim", "d_kv", "v_head_dim", "q_lora_rank", "kv_lora_rank", "sliding_window"), 8),
    **dict.fromkeys(("mamba_d_state", "hidden_size_per_layer_input", "block_size"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "patch_size", "state_size", "conv_kernel"), 4),
    **dict.fromkeys(("mamba_n_heads", "attention_window"), 4),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "mamba_n_groups"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 64),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 67),
    **dict.fromkeys(("mamba_d_head", "image_size"), 16),
    "num_experts_per_tok": 2,
    "num_key_value_heads": 2,
    "type_vocab_size": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS = {
    "causal": (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, hf.AutoModelForCausalLM),
    "masked": (auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, hf.AutoModelForMaskedLM),
    "classes": (auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, hf.AutoModelForSequenceClassification),
    "pairs": (auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, hf.AutoModelForSeq2SeqLM),
    "images": (auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, hf.AutoModelForImageClassification),
}
MOST = 5_000_000
"""Parameters of a model that still counts as tiny."""


class NotTiny(Exception):
    """No small model of this family can be made from sizes alone."""


def families() -> list[tuple[str, str]]:
    """(head, model type) of all."""
    return [(head, kind) for head, (names, _) in HEADS.items() for kind in names if kind in hf.CONFIG_MAPPING]


def build(head: str, kind: str):
    """A seeded model in training mode without dropout or jitter, every weight other than zero.

    Raises:
        NotTiny: its config does not take these sizes.
    """
    make = HEADS[head][1].from_config
    try:
        config = _config(head, hf.CONFIG_MAPPING[kind])
        if head == "pairs" and getattr(config, "decoder_start_token_id", None) is None:
            config.decoder_start_token_id = 0
        with torch.device("meta"):
            count = sum(p.numel() for p in make(config).parameters())
        if count > MOST:
            raise NotTiny(f"{count:,} parameters")
        torch.manual_seed(0)
        model = make(config).train()
    except Exception as error:
        raise NotTiny(f"{type(error).__name__}: {error}") from error
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


def _config(head: str, cls: type):
    given = cls().to_dict()
    fields = {k: v for k, v in SIZES.items() if not isinstance(given.get(k), list | dict | tuple | None)}
    fields |= {k: 0.0 for k, v in given.items() if ("drop" in k or "jitter" in k) and isinstance(v, float)}
    if "pad_token_id" in given:
        fields["pad_token_id"] = 0
    if "use_cache" in given:
        fields["use_cache"] = False
    if "qk_rope_head_dim" in given:
        fields |= {"head_dim": SIZES["qk_rope_head_dim"], "num_key_value_heads": SIZES["num_attention_heads"]}
    if head in ("classes", "images"):
        fields["num_labels"] = 3
    mixed = {  # one of each kind of layer
        name: (list(dict.fromkeys(given[name])) * LAYERS)[:LAYERS]
        for name in ("layer_types", "mlp_layer_types")
        if isinstance(given.get(name), list)
    }
    try:
        return cls(**fields, **mixed)
    except Exception:
        return cls(**fields)


def batch(head: str, model) -> dict[str, torch.Tensor]:
    """Three rows, one of them with padding; or two images."""
    generator = torch.Generator().manual_seed(1)
    if head == "images":
        channels = getattr(model.config, "num_channels", None) or 3
        pixels = torch.randn(2, channels, SIZES["image_size"], SIZES["image_size"], generator=generator)
        return {"pixel_values": pixels, "labels": torch.tensor([0, 2])}
    ids = torch.randint(3, 60, (3, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    ids[0, -1] = ids[1, 7] = ids[2, -1] = SIZES["eos_token_id"]
    ids[1, 8:] = 0
    labels = {
        "pairs": lambda: torch.randint(3, 60, (3, 7), generator=generator),
        "classes": lambda: torch.tensor([0, 2, 1]),
    }.get(head, lambda: ids.masked_fill(mask == 0, -100))()
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
