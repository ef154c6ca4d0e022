"""Which methods stand together: every pair, applied to small models of several kinds and taken off again."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import record

NAME = "composition"
QUICK = True
NEEDED: dict[str, dict[str, Any]] = {"PartialEmbedding": {"ids": range(60), "force": True}, "TokenTune": {"ratio": 0.3}}
"""What has no default."""


def models() -> dict[str, Callable[[], Any]]:
    """Name -> builder."""
    import transformers as hf

    size: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 64}
    t5: dict[str, Any] = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_heads": 4, "num_layers": 4, "vocab_size": 64}
    t5 |= {"decoder_start_token_id": 0}
    vit: dict[str, Any] = {"image_size": 32, "patch_size": 8, "num_hidden_layers": 4}
    vit |= {key: value for key, value in size.items() if key != "vocab_size"}
    return {
        "BERT": lambda: hf.BertForSequenceClassification(hf.BertConfig(**size, num_hidden_layers=4)),
        "Llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**size, num_hidden_layers=4)),
        "T5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**t5)),
        "ViT": lambda: hf.ViTForImageClassification(hf.ViTConfig(**vit)),
    }


def run() -> list[dict[str, Any]]:
    """One row per model and pair of methods; a method with itself tells whether it works on the model at all."""
    import tightfit

    rows = []
    for name, build in models().items():
        model = build()
        values = {cls.__name__: cls(**NEEDED.get(cls.__name__, {})) for cls in tightfit.methods()}
        works = {}
        for method, value in values.items():
            works[method] = refusal(model, [value])
            rows.append({"model": name, "pair": [method], "refused": works[method]})
        for pair in itertools.combinations([method for method, why in works.items() if why is None], 2):
            refused = refusal(model, [values[method] for method in pair])
            rows.append({"model": name, "pair": list(pair), "refused": refused})
    record.write(NAME, {"models": list(models()), "needed": {k: repr(v) for k, v in NEEDED.items()}}, rows)
    return rows


def refusal(model: Any, transforms: list[Any]) -> str | None:
    """Why a model cannot take the methods, or None; each pair is really applied and taken off."""
    import tightfit

    try:
        tightfit.apply(model, tightfit.chain(*transforms)).remove()
    except (tightfit.TightfitError, ValueError, TypeError) as error:
        return str(error)
    return None
