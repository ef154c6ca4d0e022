"""The configurations on which predicted and measured peaks are compared, and their models from config."""

from __future__ import annotations

DEFAULTS = {
    "family": "bert",
    "batch": 4,
    "length": 128,
    "optimizer": "adamw",
    "dtype": "float32",
    "attention": "sdpa",
    "mask": "padded",
    "dropout": True,
    "checkpointing": False,
    "lora": False,
    "clip": None,
    "blocks": 2,
    "width": 256,
    "autocast": False,
    "accumulate": 1,
    "head": "default",
    "vocabulary": None,
    "recipe": None,
}


def configurations() -> dict[str, dict]:
    """Name -> what differs from DEFAULTS."""
    families = ("bert", "roberta", "distilbert", "gpt2", "opt", "llama", "qwen3", "gemma2", "t5", "bart", "vit")
    rows: dict[str, dict] = {}

    def add(family: str, **settings) -> None:
        parts = [f"{k}={v}" for k, v in settings.items()]
        rows[" ".join([family, *parts])] = {"family": family, **settings}

    for family in families:
        add(family, batch=1)
        add(family, batch=16, optimizer="adamw-foreach", clip=1.0)
        add(family, dtype="bfloat16", optimizer="adamw-fused")
        add(family, attention="eager", optimizer="sgd-momentum", length=64)
        add(family, checkpointing=True, dropout=False, batch=8)
        add(family, lora=True, dtype="bfloat16", batch=8)
    for family in ("bert", "llama", "t5", "gemma2"):
        add(family, mask="full", batch=4, length=512)
        add(family, mask="absent", batch=8, optimizer="adafactor")
        add(family, lora=True, checkpointing=True, clip=1.0)
    for family in ("bert", "llama", "gpt2", "vit"):
        add(family, autocast=True, batch=8)
    for family in ("bert", "llama", "bart"):
        add(family, accumulate=2, batch=8)
    # many blocks, a small vocabulary and long sequences: the blocks make the peak
    for family in ("bert", "llama", "gpt2", "t5"):
        add(family, blocks=12, width=128, vocabulary=1000, length=256, batch=8)
        add(family, blocks=12, width=128, vocabulary=1000, length=256, batch=8, checkpointing=True)
    add("roberta", blocks=12, width=128, vocabulary=1000, length=256, batch=8, attention="eager", dropout=False)
    add("bart", blocks=12, width=128, vocabulary=1000, length=128, batch=8, optimizer="sgd")
    add("qwen3", blocks=12, width=128, vocabulary=1000, length=256, batch=8, lora=True)
    add("distilbert", blocks=6, width=256, vocabulary=1000, length=128, batch=16, dtype="bfloat16", optimizer="sgd")
    add("vit", blocks=12, width=128, batch=8, dropout=False)
    add("bert", blocks=6, width=768, batch=4, optimizer="adamw-foreach")
    add("bert", blocks=12, width=768, batch=8, dropout=False, optimizer="sgd")
    add("gpt2", blocks=6, width=768, batch=2, length=256)
    # our own methods
    for family in ("bert", "gpt2", "llama", "t5"):
        add(family, recipe="partial-embedding", batch=8)
        add(family, recipe="partial-embedding+checkpointing", batch=8, clip=1.0)
        add(family, recipe="partial-embedding+lora", dtype="bfloat16")
    add("bert", recipe="lora+checkpointing", batch=8)
    for family in ("bert", "gpt2", "llama", "t5"):
        add(family, recipe="fused-ops", batch=8)
        add(family, recipe="fused-ops+checkpointing", batch=8, optimizer="adamw-foreach", clip=1.0)
    add("llama", recipe="fused-ops+lora", dtype="bfloat16")
    add("bert", recipe="fused-ops+lora", blocks=6, batch=16, vocabulary=1000)
    add("bert", recipe="fused-ops", blocks=12, width=128, vocabulary=1000, length=256, batch=8, optimizer="sgd")
    add("llama", recipe="partial-embedding+fused-ops", batch=8)
    for family in ("bert", "gpt2", "llama", "t5"):
        add(family, recipe="mesa", batch=8)
        add(family, recipe="fused-ops+mesa-all", batch=8, vocabulary=1000)
        add(family, recipe="wta-crs", batch=8, vocabulary=1000)
        add(family, recipe="lora+velora", batch=8, vocabulary=1000)
    add("llama", recipe="fused-ops+mesa", dtype="bfloat16", batch=8, vocabulary=1000)
    add("bert", recipe="fused-ops+mesa+wta-crs", batch=8, blocks=6, vocabulary=1000)
    add("llama", recipe="lora+fused-ops+mesa-all", dtype="bfloat16", batch=8)
    add("vit", recipe="fused-ops+mesa", batch=8)
    add("bert", recipe="mesa+checkpointing", batch=8, vocabulary=1000)
    for family in ("bert", "llama"):
        add(family, recipe="token-tune", batch=8, vocabulary=1000)
        add(family, recipe="lora+reversible", batch=8, vocabulary=1000, blocks=8)
        add(family, recipe="sparse-adapter", batch=8, vocabulary=1000)
        add(family, recipe="recurrent-memory", batch=8, vocabulary=1000)
        add(family, recipe="ladder-side", batch=8, blocks=8, width=128, vocabulary=1000)
    add("llama", recipe="lora+token-tune+checkpointing", batch=8, vocabulary=1000, blocks=6)
    add("t5", recipe="lora+reversible", batch=8, vocabulary=1000, blocks=6)
    add("t5", recipe="sherl", batch=8, blocks=8, width=128, vocabulary=1000)
    add("gpt2", recipe="meft1", batch=8, vocabulary=1000)
    add("llama", recipe="lora+fused-ops+recurrent-memory", batch=8, vocabulary=1000)
    add("bert", recipe="token-turing-machine", batch=8, vocabulary=1000)
    for recipe in ("losa", "learnable-memory", "learnable-memory-shared", "token-turing-machine", "ladder-side"):
        add("vit", recipe=recipe, batch=8, blocks=6)
    return rows


def build(c: dict):
    """The model of a configuration, in training mode."""
    import torch
    import transformers as tf

    width, blocks, heads, inner = c["width"], c["blocks"], 4 * c["width"] // 256 or 2, 4 * c["width"]
    encoder = {
        "hidden_size": width,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "intermediate_size": inner,
    }
    decoder = {**encoder, "num_key_value_heads": max(1, heads // 2), "head_dim": width // heads}
    family = c["family"]
    vocabulary = {"vocab_size": c["vocabulary"]} if c["vocabulary"] else {}
    if family in ("bert", "roberta"):
        config = (tf.BertConfig if family == "bert" else tf.RobertaConfig)(**encoder, **vocabulary)
        if family == "roberta":
            config.max_position_embeddings, config.vocab_size = 514, c["vocabulary"] or 50265
        kind = tf.BertForSequenceClassification if family == "bert" else tf.RobertaForTokenClassification
    elif family == "distilbert":
        config = tf.DistilBertConfig(dim=width, n_layers=blocks, n_heads=heads, hidden_dim=inner, **vocabulary)
        kind = tf.DistilBertForSequenceClassification
    elif family == "gpt2":
        config = tf.GPT2Config(n_embd=width, n_layer=blocks, n_head=heads, **vocabulary)
        kind = tf.GPT2LMHeadModel
    elif family == "opt":
        config = tf.OPTConfig(
            hidden_size=width,
            num_hidden_layers=blocks,
            num_attention_heads=heads,
            ffn_dim=inner,
            word_embed_proj_dim=width,
        )
        kind = tf.OPTForCausalLM
    elif family == "llama":
        config, kind = tf.LlamaConfig(**decoder, **vocabulary), tf.LlamaForCausalLM
    elif family == "qwen3":
        config, kind = tf.Qwen3Config(**decoder, **vocabulary), tf.Qwen3ForCausalLM
    elif family == "gemma2":
        config = tf.Gemma2Config(**decoder, sliding_window=64, query_pre_attn_scalar=width // heads, **vocabulary)
        kind = tf.Gemma2ForCausalLM
    elif family == "t5":
        config = tf.T5Config(
            d_model=width,
            d_kv=width // heads,
            d_ff=inner,
            num_layers=blocks,
            num_decoder_layers=blocks,
            num_heads=heads,
            decoder_start_token_id=0,
            **vocabulary,
        )
        kind = tf.T5ForConditionalGeneration
    elif family == "bart":
        config = tf.BartConfig(
            d_model=width,
            encoder_layers=blocks,
            decoder_layers=blocks,
            encoder_attention_heads=heads,
            decoder_attention_heads=heads,
            encoder_ffn_dim=inner,
            decoder_ffn_dim=inner,
            **vocabulary,
        )
        kind = tf.BartForConditionalGeneration
    elif family == "vit":
        config, kind = tf.ViTConfig(**encoder, image_size=176), tf.ViTForImageClassification
    else:
        raise ValueError(f"family: got {family!r}")
    if not c["dropout"]:
        for key, value in list(vars(config).items()):
            if "drop" in key and isinstance(value, float):
                setattr(config, key, 0.0)
    config._attn_implementation = "eager" if family == "gemma2" else c["attention"]
    model = kind(config).to(getattr(torch, c["dtype"]))
    if c["lora"]:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    if c["checkpointing"]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if c["lora"]:
            model.enable_input_require_grads()
    if c["recipe"]:
        import tightfit

        special = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
        found = {getattr(model.config, name, None) for name in special}
        kept = {*range(1100), *(i for i in found if isinstance(i, int))}  # the example batch stays below 1100
        known = {
            "partial-embedding": tightfit.PartialEmbedding(ids=sorted(kept)),
            "fused-ops": tightfit.FusedOps(),
            "mesa": tightfit.Mesa(),
            "mesa-all": tightfit.Mesa(attention=True, mlp_bits=4),
            "wta-crs": tightfit.WtaCrs(),
            "velora": tightfit.Velora(where="*"),
            "lora": tightfit.Lora(),
            "checkpointing": tightfit.Checkpointing(),
            "token-tune": tightfit.TokenTune(ratio=0.25),
            "reversible": tightfit.Reversible(),
            "meft1": tightfit.Reversible(variant="meft1"),
            "ladder-side": tightfit.LadderSide(),
            "sherl": tightfit.Sherl(),
            "losa": tightfit.Losa(),
            "sparse-adapter": tightfit.SparseAdapter(width=1024, top_k=16),
            "recurrent-memory": tightfit.RecurrentMemory(segment=32),
            "learnable-memory": tightfit.LearnableMemory(),
            "learnable-memory-shared": tightfit.LearnableMemory(mode="shared"),
            "token-turing-machine": tightfit.TokenTuringMachine(segment=16),
        }
        model = tightfit.apply(model, tightfit.chain(*(known[name] for name in c["recipe"].split("+")))).model
    return model.train()
