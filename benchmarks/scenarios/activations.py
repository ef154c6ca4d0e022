"""Forward and backward of BERT-base and a Llama under recipes: planned peak and saved bytes, as ratios to stock.

Everything is simulated on models without weights (the plan's accuracy has its own benchmark), so the figures are the
same on every machine.
"""

from __future__ import annotations

from typing import Any

import record

NAME = "activations"
QUICK = True
MODELS = {
    "BERT-base, dropout 0.1": ("bert", 0.1, (16, 128)),
    "BERT-base, no dropout": ("bert", 0.0, (16, 128)),
    "Llama 8 x 512, vocabulary 32,000": ("llama", 0.0, (4, 256)),
}
RECIPES: dict[str, tuple[str, ...]] = {
    "stock": (),
    "Checkpointing": ("Checkpointing",),
    "FusedOps": ("FusedOps",),
    "Lora": ("Lora",),
    "Lora + Checkpointing": ("Lora", "Checkpointing"),
    "Lora + FusedOps": ("Lora", "FusedOps"),
    "Lora + FusedOps + Checkpointing": ("Lora", "FusedOps", "Checkpointing"),
}


def build(family: str, dropout: float):
    """The model without weights."""
    import torch
    import transformers as hf

    with torch.device("meta"):
        if family == "bert":
            rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
            return hf.BertForSequenceClassification(hf.BertConfig(**rates)).train()
        size = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8}
        return hf.LlamaForCausalLM(hf.LlamaConfig(**size, vocab_size=32000)).train()


def run() -> list[dict[str, Any]]:
    """One row per model and recipe."""
    import tightfit
    from tightfit.core.simulate import example_batch, simulate

    rows: list[dict[str, Any]] = []
    for name, (family, dropout, size) in MODELS.items():
        for recipe, methods in RECIPES.items():
            model = build(family, dropout)
            batch = example_batch(model, *size, padded=False)
            if methods:
                values = [getattr(tightfit, method)() for method in methods]
                model = tightfit.apply(model, tightfit.chain(*values)).model
            found = simulate(model, batch, optimizer="sgd", extrapolate=False)
            peak = max(found.phases.get(phase, 0) for phase in ("forward", "backward", "recompute"))
            blocks = sum(size for module, size in found.saved_by_module.items() if "layer" in module)
            rows.append(
                {
                    "model": name,
                    "recipe": recipe,
                    "batch": f"{size[0]} x {size[1]}",
                    "peak_bytes": peak - found.static_bytes,
                    "saved_bytes": found.saved_bytes,
                    "block_bytes": blocks,
                }
            )
            print(rows[-1], flush=True)
    record.write(NAME, {"optimizer": "sgd"}, rows)
    return rows
