"""Forward and backward of BERT-base and a Llama under recipes: planned peak and saved bytes, as ratios to stock.

Everything is simulated on models without weights (the plan's accuracy has its own benchmark), so the figures in float32
are the same on every machine; in bfloat16 products take scratch memory, which depends on the CPU.
"""

from __future__ import annotations

from typing import Any

import record
from recipes import ATTENTION, CHECKPOINTING, FUSED, LORA

NAME = "activations"
QUICK = True
BERT = ("bert", {})
LLAMA = ("llama", {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8})
LLAMA_3 = (
    "llama",
    {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 2,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
)
MODELS: dict[str, tuple[tuple[str, dict[str, Any]], float, tuple[int, int], str]] = {
    "BERT-base, dropout 0.1": (BERT, 0.1, (16, 128), "float32"),
    "BERT-base, no dropout": (BERT, 0.0, (16, 128), "float32"),
    "Llama 8 x 512, vocabulary 32,000": (LLAMA, 0.0, (4, 256), "float32"),
    "Llama 8 x 512 in bfloat16": (LLAMA, 0.0, (4, 256), "bfloat16"),
    "two blocks of Llama 3 8B": (LLAMA_3, 0.0, (1, 2048), "float32"),
    "two blocks of Llama 3 8B in bfloat16": (LLAMA_3, 0.0, (1, 2048), "bfloat16"),
}
RECIPES: dict[str, list[dict[str, Any]]] = {
    "stock": [],
    "Checkpointing": CHECKPOINTING,
    "WtaCrs": [{"WtaCrs": {}}],
    "Mesa": [{"Mesa": {}}],
    "FusedOps": FUSED,
    "FusedOps + Mesa": [*FUSED, {"Mesa": {}}],
    "FusedOps + Mesa(attention=True)": [*FUSED, *ATTENTION],
    "FusedOps + Mesa(attention=True, mlp_bits=4)": [*FUSED, {"Mesa": {"attention": True, "mlp_bits": 4}}],
    "Lora": LORA,
    "Lora + Checkpointing": [*LORA, *CHECKPOINTING],
    "Lora + FusedOps": [*LORA, *FUSED],
    "Lora + FusedOps + Mesa": [*LORA, *FUSED, {"Mesa": {}}],
    "Lora + FusedOps + Mesa(attention=True)": [*LORA, *FUSED, *ATTENTION],
    "Lora + FusedOps + Checkpointing": [*LORA, *FUSED, *CHECKPOINTING],
}


def build(family: str, size: dict[str, Any], dropout: float, dtype: str):
    """The model without weights."""
    import torch
    import transformers as hf

    with torch.device("meta"):
        if family == "bert":
            rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
            model: Any = hf.BertForSequenceClassification(hf.BertConfig(**rates))
        else:
            model = hf.LlamaForCausalLM(hf.LlamaConfig(**size, vocab_size=32_000))
    return model.to(getattr(torch, dtype)).train()


def run() -> list[dict[str, Any]]:
    """One row per model and recipe."""
    import tightfit
    from tightfit.core.simulate import example_batch, simulate

    rows: list[dict[str, Any]] = []
    for name, ((family, config), dropout, size, dtype) in MODELS.items():
        for recipe, methods in RECIPES.items():
            model = build(family, config, dropout, dtype)
            batch = example_batch(model, *size, padded=False)
            if methods:
                model = tightfit.apply(model, tightfit.Recipe.from_list(methods)).model
            found = simulate(model, batch, optimizer="sgd", extrapolate=False)
            blocks = sum(size for module, size in found.saved_by_module.items() if "layer" in module)
            rows.append(
                {
                    "model": name,
                    "recipe": recipe,
                    "batch": f"{size[0]} x {size[1]}",
                    "peak_bytes": found.pass_bytes - found.static_bytes,
                    "saved_bytes": found.saved_bytes,
                    "block_bytes": blocks,
                }
            )
            print(rows[-1], flush=True)
    record.write(NAME, {"optimizer": "sgd"}, rows)
    return rows
