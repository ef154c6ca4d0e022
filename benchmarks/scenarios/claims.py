"""The papers' headline figures for memory beside the planned peaks of the same models, sizes and settings.

What a paper does not say (batch, length, attention) is chosen here and stands in the row. Models have no weights; peaks
are those of a whole step with AdamW in fp32, or of forward and backward above weights and batch where a paper speaks of
activations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import record
import torch
from recipes import ATTENTION, FUSED, LORA

NAME = "claims"
QUICK = False


@dataclasses.dataclass(frozen=True)
class Claim:
    """One published ratio.

    Attributes:
        size: rows and tokens of a batch.
        beside, recipe: the two that are compared, as the paper has them.
        published: its peak over the other's.
        best: what else there is here for the same model.
        activations: compare forward and backward above weights and batch.
    """

    paper: str
    model: str
    size: tuple[int, int]
    beside: tuple[str, list[Any]]
    recipe: tuple[str, list[Any]]
    published: float
    best: tuple[str, list[Any]]
    activations: bool = False


STOCK: tuple[str, list[Any]] = ("full fine-tuning", [])
PLAIN_LORA: tuple[str, list[Any]] = ("LoRA", LORA)
LEAN = ("FusedOps + Mesa", [*FUSED, *ATTENTION])
SAMPLED = ("FusedOps + Mesa + WtaCrs", [*FUSED, *ATTENTION, {"WtaCrs": {}}])
LEAN_LORA = ("Lora + FusedOps + Mesa", [*LORA, *FUSED, *ATTENTION])
TENTH: list[Any] = [{"WtaCrs": {"budget": 0.1}}]
SIDE = {"projection": "linear", "merge": "side"}
CLAIMS = (
    Claim("WTA-CRS", "T5-base", (64, 128), STOCK, ("WtaCrs, 0.3", [{"WtaCrs": {}}]), 8.44 / 17.66, SAMPLED),
    Claim("WTA-CRS", "T5-base", (64, 128), STOCK, ("WtaCrs, 0.1", TENTH), 7.30 / 17.66, SAMPLED),
    Claim(
        "WTA-CRS",
        "T5-base",
        (64, 128),
        PLAIN_LORA,
        ("Lora + WtaCrs, 0.3", [*LORA, {"WtaCrs": {}}]),
        6.50 / 13.84,
        LEAN_LORA,
    ),
    Claim(
        "VeLoRA",
        "RoBERTa-base",
        (32, 128),
        PLAIN_LORA,
        ("Lora + Velora", [*LORA, {"Velora": {"where": "*"}}]),
        2.23 / 2.71,
        LEAN_LORA,
    ),
    Claim("Mesa", "DeiT-tiny", (128, 197), STOCK, ("Mesa", [{"Mesa": {}}]), 1858 / 4171, LEAN),
    Claim("Mesa", "DeiT-small", (128, 197), STOCK, ("Mesa", [{"Mesa": {}}]), 3840 / 8459, LEAN),
    Claim("Mesa", "DeiT-base", (128, 197), STOCK, ("Mesa", [{"Mesa": {}}]), 8616 / 17691, LEAN),
    Claim(
        "TokenTune",
        "Llama-3.2-1B",
        (4, 512),
        STOCK,
        ("TokenTune, 0.1", [{"TokenTune": {"ratio": 0.1}}]),
        0.646,
        ("FusedOps + TokenTune, 0.1", [*FUSED, {"TokenTune": {"ratio": 0.1}}]),
    ),
    Claim(
        "MEFT",
        "BERT-base",
        (32, 128),
        STOCK,
        ("Reversible, meft1", [{"Reversible": {"variant": "meft1", "adapter_dim": 8, "merge": "mean"}}]),
        0.16,
        ("Lora + FusedOps + Reversible", [*LORA, *FUSED, {"Reversible": {}}]),
        activations=True,
    ),
    Claim(
        "LST",
        "T5-base",
        (100, 128),
        STOCK,
        ("LadderSide, as published", [{"LadderSide": SIDE}]),
        5.5 / 17.6,
        ("LadderSide, pool", [{"LadderSide": {"projection": "pool"}}]),
    ),
    Claim(
        "LST",
        "T5-base",
        (100, 128),
        PLAIN_LORA,
        ("LadderSide, as published", [{"LadderSide": SIDE}]),
        5.5 / 12.6,
        ("LadderSide, pool", [{"LadderSide": {"projection": "pool"}}]),
    ),
)


def models() -> dict[str, Callable[[], Any]]:
    """Makers of the papers' models from their configurations."""
    import transformers as hf

    t5 = {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12, "decoder_start_token_id": 0}
    llama = {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
        "tie_word_embeddings": True,
    }

    def deit(width: int) -> Callable[[], Any]:
        size = {"hidden_size": width, "num_attention_heads": width // 64, "intermediate_size": 4 * width}
        return lambda: hf.ViTForImageClassification(hf.ViTConfig(num_labels=1000, **size))

    return {
        "T5-base": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**t5)),
        "RoBERTa-base": lambda: hf.RobertaForSequenceClassification(
            hf.RobertaConfig(vocab_size=50_265, max_position_embeddings=514)
        ),
        "BERT-base": lambda: hf.BertForSequenceClassification(hf.BertConfig()),
        "Llama-3.2-1B": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**llama)),
        "DeiT-tiny": deit(192),
        "DeiT-small": deit(384),
        "DeiT-base": deit(768),
    }


def peak(claim: Claim, methods: list[Any]) -> int:
    """Planned bytes of a step of the claim's model under a recipe."""
    import tightfit
    from tightfit.core.simulate import example_batch

    with torch.device("meta"):
        model = models()[claim.model]().train()
    batch = example_batch(model, *claim.size, padded=False)
    recipe = tightfit.Recipe.from_list(methods)
    found = tightfit.plan(model, recipe, batch=batch, optimizer="sgd" if claim.activations else "adamw")
    step = found.simulation
    return step.pass_bytes - step.static_bytes if claim.activations else found.peak_bytes


def _same(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a peak depends on beside its recipe, which its name stands for."""
    return row["model"], *row["size"], row["activations"]


def run(claims: tuple[Claim, ...] = CLAIMS) -> list[dict[str, Any]]:
    """One row per claim, with the planned peaks of its three recipes; those of an earlier call are kept."""
    config = {"optimizer": "adamw", "dtype": "float32"}
    rows: list[dict[str, Any]] = []
    earlier = record.rows(NAME)
    known = {(*_same(row), name): value for row in earlier for name, value in row["peaks"].items()}
    for claim in claims:
        row = {**dataclasses.asdict(claim), "peaks": {}}
        for name, methods in (claim.beside, claim.recipe, claim.best):
            key = (*_same(row), name)
            if key not in known:
                known[key] = peak(claim, methods)
            row["peaks"][name] = known[key]
        rows.append(row)
        print({key: row[key] for key in ("paper", "model", "published", "peaks")}, flush=True)
        record.write(NAME, config, rows)
    return rows
