"""Parameter shares that PartialEmbedding removes, by `plan` on skeletons, beside a published table.

The published figures are those of the transformer-smaller-training-vocab project, which removes the same rows.
"""

from __future__ import annotations

from typing import Any

import record

NAME = "vocabulary_shares"
QUICK = True
PUBLISHED = {  # data set -> (% of vocabulary unused, % of model parameters removed) for XLM-R base
    "CoLA": (97.79, 67.52),
    "MNLI": (88.83, 61.34),
    "MRPC": (94.88, 65.52),
    "QNLI": (87.57, 60.47),
    "QQP": (85.40, 58.98),
    "RTE": (93.10, 64.29),
    "SST-2": (96.25, 66.47),
    "STS-B": (94.88, 65.52),
    "WNLI": (99.25, 68.54),
    "CoNLL-03": (93.13, 64.31),
}
ROWS = 250_002


def run() -> list[dict[str, Any]]:
    """One row per data set."""
    from transformers import XLMRobertaConfig

    import tightfit

    config = XLMRobertaConfig(vocab_size=ROWS, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5)
    model = tightfit.skeleton(config)
    total = sum(p.numel() for p in model.parameters())
    rows = []
    for name, (unused, removed) in PUBLISHED.items():
        kept = round(ROWS * (1 - unused / 100))
        plan = tightfit.plan(model, tightfit.PartialEmbedding(ids=range(kept)), batch=(1, 8))
        rows.append(
            {
                "data": name,
                "kept_rows": kept,
                "published_percent": removed,
                "planned_percent": 100 * (total - plan.trainable_parameters) / total,
                "adamw_bytes_saved": (total - plan.trainable_parameters) * 16,
            }
        )
    record.write(NAME, {"model": "XLM-R base (config)", "parameters": total}, rows)
    return rows
