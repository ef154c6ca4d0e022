"""Memory against time: every method and the sensible compositions beside today's baselines, on five model shapes.

Peaks and saved bytes are those of the whole model, planned (the plan's accuracy has its own benchmark), without
weights. Step times are of forward and backward of the same model with fewer blocks, in turns with stock, each in a
process of its own with one thread; optimizer steps are not in them. GaLore, whose steps are taken in backward, has a
measured peak and no time. A recipe that a model refuses is a row with the reason. Every row is written as it ends, and
the next call goes on.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import galore
import record
import torch
from recipes import ATTENTION, CHECKPOINTING, FUSED, LORA
from turns import forward_backward, measured, process

NAME = "frontier"
QUICK = False
ROUNDS = 3
LLAMA = {"hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8, "vocab_size": 32_000}
T5 = {"decoder_start_token_id": 0}
VIT = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
SHAPES: dict[str, dict[str, Any]] = {
    "BERT-base, 16 x 128": {"family": "bert", "blocks": 12, "timed_blocks": 3, "size": {}, "batch": (16, 128)},
    "Llama 8 x 512, 4 x 256": {"family": "llama", "blocks": 8, "timed_blocks": 4, "size": LLAMA, "batch": (4, 256)},
    "T5-small, 8 x 128": {"family": "t5", "blocks": 6, "timed_blocks": 3, "size": T5, "batch": (8, 128)},
    "ViT-small, 16 x 197": {"family": "vit", "blocks": 12, "timed_blocks": 4, "size": VIT, "batch": (16, 197)},
    "Llama 8 x 512, 2 x 1024": {"family": "llama", "blocks": 8, "timed_blocks": 2, "size": LLAMA, "batch": (2, 1024)},
}
VOCABULARY: list[Any] = [{"PartialEmbedding": {"ids": list(range(4000))}}]
VELORA = {"num_groups": 32, "init_type": "batch_average_once"}
UPDATED_IN_BACKWARD = "GaLore, layer by layer"
BASELINES: dict[str, list[Any]] = {
    "stock": [],
    "checkpointing": CHECKPOINTING,
    "LoRA": LORA,
    "LoRA + checkpointing": [*LORA, *CHECKPOINTING],
    "LoRA-FA": LORA,
    "LoRA, PEFT's VeLoRA": [{"Lora": {"config": {"peft_type": "LORA", "r": 8, "lora_alpha": 16}}}],
    UPDATED_IN_BACKWARD: [],
}
OURS: dict[str, list[Any]] = {
    "FusedOps": FUSED,
    "FusedOps + Checkpointing": [*FUSED, *CHECKPOINTING],
    "Mesa": [{"Mesa": {}}],
    "FusedOps + Mesa": [*FUSED, {"Mesa": {}}],
    "FusedOps + Mesa, attention": [*FUSED, *ATTENTION],
    "WtaCrs": [{"WtaCrs": {}}],
    "FusedOps + WtaCrs": [*FUSED, {"WtaCrs": {}}],
    "FusedOps + Mesa + WtaCrs": [*FUSED, {"Mesa": {}}, {"WtaCrs": {}}],
    "TokenTune 0.2": [{"TokenTune": {"ratio": 0.2}}],
    "FusedOps + TokenTune 0.2": [*FUSED, {"TokenTune": {"ratio": 0.2}}],
    "PartialEmbedding": VOCABULARY,
    "PartialEmbedding + FusedOps + Mesa": [*VOCABULARY, *FUSED, {"Mesa": {}}],
    "PartialEmbedding + FusedOps + Checkpointing": [*VOCABULARY, *FUSED, *CHECKPOINTING],
    "Lora + FusedOps": [*LORA, *FUSED],
    "Lora + FusedOps + Mesa, attention": [*LORA, *FUSED, *ATTENTION],
    "Lora + FusedOps + Checkpointing": [*LORA, *FUSED, *CHECKPOINTING],
    "Lora + Velora": [*LORA, {"Velora": {"where": "*"}}],
    "Lora + TokenTune 0.2": [*LORA, {"TokenTune": {"ratio": 0.2}}],
    "Lora + PartialEmbedding + FusedOps": [*LORA, *VOCABULARY, *FUSED],
    "Lora + PartialEmbedding + FusedOps + Checkpointing": [*LORA, *VOCABULARY, *FUSED, *CHECKPOINTING],
    "Lora + Reversible": [*LORA, {"Reversible": {}}],
    "Lora + FusedOps + Reversible": [*LORA, *FUSED, {"Reversible": {}}],
    "Lora + PartialEmbedding + FusedOps + Reversible": [*LORA, *VOCABULARY, *FUSED, {"Reversible": {}}],
    "LadderSide": [{"LadderSide": {}}],
    "LadderSide + FusedOps": [{"LadderSide": {}}, *FUSED],
    "LadderSide + FusedOps + Mesa, attention": [{"LadderSide": {}}, *FUSED, *ATTENTION],
    "LadderSide, pool": [{"LadderSide": {"projection": "pool"}}],
    "LadderSide + PartialEmbedding": [{"LadderSide": {}}, *VOCABULARY],
    "Sherl": [{"Sherl": {}}],
    "Losa": [{"Losa": {}}],
    "Losa + FusedOps": [{"Losa": {}}, *FUSED],
    "SparseAdapter": [{"SparseAdapter": {"width": 4096, "groups": "auto"}}],
}
RECIPES = BASELINES | OURS
EDITED = ("LoRA-FA", "LoRA, PEFT's VeLoRA")
"""Baselines that are no recipe of their own: something is changed in the model afterwards."""
LATER = (
    *("Mesa", "PartialEmbedding", "PartialEmbedding + FusedOps + Mesa", "Lora + PartialEmbedding + FusedOps"),
    *("Lora + PartialEmbedding + FusedOps + Reversible", "LadderSide, pool"),
    *("LadderSide + PartialEmbedding", "SparseAdapter"),
)
"""Recipes that are timed once all shapes have the others' times."""


def built(shape: str, blocks: int, *, meta: bool) -> Any:
    """The model of a shape with so many blocks, without weights on the meta device."""
    import transformers as hf

    settings = SHAPES[shape]
    family, size = settings["family"], settings["size"]
    with torch.device("meta" if meta else "cpu"):
        if family == "bert":
            model: Any = hf.BertForSequenceClassification(hf.BertConfig(num_hidden_layers=blocks, **size))
        elif family == "llama":
            model = hf.LlamaForCausalLM(hf.LlamaConfig(num_hidden_layers=blocks, **size))
        elif family == "t5":
            model = hf.T5ForConditionalGeneration(hf.T5Config(num_layers=blocks, num_decoder_layers=blocks, **size))
        else:
            model = hf.ViTForImageClassification(hf.ViTConfig(num_hidden_layers=blocks, num_labels=10, **size))
    return model.train()


def applied(model: Any, recipe: str) -> Any:
    """The model under a recipe; LoRA-FA is LoRA whose first matrices stay as they are (arXiv 2308.03303)."""
    import tightfit

    methods = RECIPES[recipe]
    if recipe == "LoRA, PEFT's VeLoRA":
        config = {**methods[0]["Lora"]["config"], "target_modules": "all-linear", "velora_config": VELORA}
        methods = [{"Lora": {"config": config}}]
    out = tightfit.apply(model, tightfit.Recipe.from_list(methods))
    for name, parameter in out.model.named_parameters():
        if recipe == "LoRA-FA" and "lora_A" in name:
            parameter.requires_grad_(False)
    for module in out.model.modules():
        if hasattr(module, "lora_velora_initialized"):  # or it would look at values
            module.lora_velora_initialized["default"] = True
    return out


def example(model: Any, shape: str) -> dict[str, torch.Tensor]:
    """A batch of the shape, every row full."""
    from tightfit.core.simulate import example_batch

    return example_batch(model, *SHAPES[shape]["batch"], padded=False)


def memory(shape: str, recipe: str) -> dict[str, Any]:
    """Planned bytes of a step of the whole model: of forward and backward above what is always there, and in all."""
    import tightfit
    from tightfit.core.simulate import simulate

    model = built(shape, SHAPES[shape]["blocks"], meta=recipe != UPDATED_IN_BACKWARD)
    batch = example(model, shape)
    if recipe == UPDATED_IN_BACKWARD:
        return galore.memory(model, batch)
    if recipe in EDITED:
        model = applied(model, recipe).model
        passes, whole = (simulate(model, batch, optimizer=name) for name in ("sgd", "adamw"))
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    else:
        chain = tightfit.Recipe.from_list(RECIPES[recipe])
        plans = [tightfit.plan(model, chain, batch=batch, optimizer=name) for name in ("sgd", "adamw")]
        passes, whole = (found.simulation for found in plans)
        trainable = plans[0].trainable_parameters
    return {
        "peak_bytes": passes.pass_bytes - passes.static_bytes,
        "whole_peak_bytes": whole.peak_bytes,
        "saved_bytes": passes.saved_bytes,
        "trainable": trainable,
    }


def stepper(shape: str, recipe: str) -> Any:
    """Forward and backward of the model with fewer blocks under the recipe."""
    torch.manual_seed(0)
    model = built(shape, SHAPES[shape]["timed_blocks"], meta=False)
    batch = example(model, shape)
    return forward_backward(applied(model, recipe), batch)


def run(names: tuple[str, ...] = tuple(SHAPES), *, times: bool = True) -> list[dict[str, Any]]:
    """One row per shape and recipe: its bytes, and with `times` the ratio of its step time to stock's."""
    from tightfit.core.errors import TightfitError

    config = {"rounds": ROUNDS, "shapes": SHAPES, "baselines": list(BASELINES)}
    rows: dict[tuple[str, str], dict[str, Any]] = {(row["shape"], row["recipe"]): row for row in record.rows(NAME)}

    def add(row: dict[str, Any]) -> None:
        rows[row["shape"], row["recipe"]] = row
        print(row, flush=True)
        record.write(NAME, config, [rows[key] for key in itertools.product(SHAPES, RECIPES) if key in rows])

    for shape, recipe in itertools.product(names, RECIPES):
        if (shape, recipe) not in rows:
            try:
                found = memory(shape, recipe)
            except (TightfitError, ValueError, TypeError) as error:
                found = {"refused": str(error)}
            add({"shape": shape, "recipe": recipe, **found})
    for late, shape in itertools.product((False, True), names if times else ()):
        timed = (recipe for recipe in RECIPES if (recipe in LATER) == late and recipe != UPDATED_IN_BACKWARD)
        own = [rows[shape, recipe] for recipe in timed]
        wanted = [row for row in own if "refused" not in row and "measured" not in row]
        if not wanted:
            continue
        with process(functools.partial(stepper, shape, "stock")) as stock:
            for row in wanted:
                with process(functools.partial(stepper, shape, row["recipe"])) as other:
                    add({**row, **measured(stock, other, ROUNDS)})
    return list(rows.values())
