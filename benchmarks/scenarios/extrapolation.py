"""Extrapolated against full simulation of deep stacks: the peak, its phase, every phase and the saved bytes.

Models are built from config on the meta device at their published sizes. The line through the peaks of two short
stacks stands beside, as what a simpler planner would say.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import record

NAME = "extrapolation"
QUICK = False
LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One model and one way to train it."""

    family: str
    config: dict[str, Any]
    depth: dict[str, int]
    batch: tuple[int, int]
    optimizer: str = "adamw"
    methods: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What the row is called."""
        depth = "+".join(str(n) for n in self.depth.values())
        size = f"{self.batch[0]} x {self.batch[1]}"
        return " ".join([self.family, f"{depth} blocks", size, self.optimizer, *self.methods])


def cases() -> list[Case]:
    """The models, with published sizes."""
    encoder = {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096}
    layers = "num_hidden_layers"
    deep = {layers: 24}
    gemma = {"hidden_size": 2304, "intermediate_size": 9216, "num_attention_heads": 8, "num_key_value_heads": 4}
    qwen = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8}
    t5 = {"d_model": 1024, "d_ff": 4096, "d_kv": 64, "num_heads": 16, "decoder_start_token_id": 0}
    bart = {"d_model": 1024, "encoder_ffn_dim": 4096, "decoder_ffn_dim": 4096}
    bart |= {"encoder_attention_heads": 16, "decoder_attention_heads": 16}
    both = {"num_layers": 24, "num_decoder_layers": 24}
    return [
        Case("Llama", LLAMA_8B, {layers: 32}, (4, 2048)),
        Case("Llama", LLAMA_8B, {layers: 32}, (4, 2048), methods=("Checkpointing",)),
        Case("Llama", LLAMA_8B, {layers: 32}, (4, 2048), "adamw-foreach", ("Checkpointing",)),
        Case("Llama", LLAMA_8B, {layers: 32}, (4, 2048), methods=("Lora", "Checkpointing")),
        Case("Bert", encoder, deep, (16, 128), "adamw-foreach"),
        Case("Bert", encoder, deep, (16, 128), methods=("Checkpointing",)),
        Case("Roberta", encoder, deep, (8, 512), "sgd", ("Lora",)),
        Case("GPT2", {"n_embd": 1024, "n_head": 16}, {"n_layer": 24}, (2, 512)),
        Case("GPT2", {"n_embd": 1024, "n_head": 16}, {"n_layer": 24}, (2, 512), "adamw-foreach", ("Checkpointing",)),
        Case("OPT", {"hidden_size": 2048, "ffn_dim": 8192, "num_attention_heads": 32}, deep, (4, 512), "adafactor"),
        Case("Qwen3", qwen, {layers: 28}, (4, 512), methods=("Lora",)),
        Case("Gemma2", {**gemma, "head_dim": 256}, {layers: 26}, (2, 1024)),
        Case("Gemma2", {**gemma, "head_dim": 256}, {layers: 26}, (2, 1024), "adamw-foreach", ("Checkpointing",)),
        Case("Gemma3", {**gemma, "head_dim": 256}, {layers: 48}, (2, 1024)),
        Case("T5", t5, both, (8, 256), "adamw-foreach"),
        Case("T5", t5, both, (8, 256), methods=("Checkpointing",)),
        Case("Bart", bart, {"encoder_layers": 12, "decoder_layers": 12}, (8, 256), methods=("Lora",)),
        Case("ViT", encoder, deep, (8, 1)),
        Case("Mistral", {"sliding_window": 512}, {layers: 32}, (1, 2048), "sgd-momentum", ("Checkpointing",)),
    ]


CLASSES = {
    "Llama": ("LlamaConfig", "LlamaForCausalLM"),
    "Bert": ("BertConfig", "BertForSequenceClassification"),
    "Roberta": ("RobertaConfig", "RobertaForTokenClassification"),
    "GPT2": ("GPT2Config", "GPT2LMHeadModel"),
    "OPT": ("OPTConfig", "OPTForCausalLM"),
    "Qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
    "Gemma2": ("Gemma2Config", "Gemma2ForCausalLM"),
    "Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
    "T5": ("T5Config", "T5ForConditionalGeneration"),
    "Bart": ("BartConfig", "BartForConditionalGeneration"),
    "ViT": ("ViTConfig", "ViTForImageClassification"),
    "Mistral": ("MistralConfig", "MistralForCausalLM"),
}


def build(case: Case, depth: dict[str, int]):
    """The transformed model of a case, `depth` blocks deep, without weights."""
    import torch
    import transformers

    import tightfit

    config, model = (getattr(transformers, name) for name in CLASSES[case.family])
    with torch.device("meta"):
        made = model(config(**case.config, **depth)).train()
    methods = [getattr(tightfit, name)() for name in case.methods]
    return tightfit.apply(made, tightfit.chain(*methods)).model if methods else made


def run() -> list[dict[str, Any]]:
    """One row per case."""
    from tightfit.core.simulate import simulate, timeline
    from tightfit.core.simulate.tracker import PHASES

    rows = {row["name"]: row for row in record.rows(NAME)}
    for case in cases():
        if case.name in rows:
            continue
        model = build(case, case.depth)
        options = {"optimizer": case.optimizer}
        start = time.process_time()
        fast = simulate(model, case.batch, extrapolate=True, **options)
        middle = time.process_time()
        whole = simulate(model, case.batch, extrapolate=False, **options)
        end = time.process_time()
        short = timeline.levels(fast._account.trace)
        phases = {name: fast.phases[name] - level for name, level in whole.phases.items()}
        rows[case.name] = {
            "name": case.name,
            "extended": any("extended" in note for note in fast.notes),
            "peak_bytes": whole.peak_bytes,
            "difference_bytes": fast.peak_bytes - whole.peak_bytes,
            "largest_phase_difference": max(phases.values(), key=abs),
            "saved_difference": fast.saved_bytes - whole.saved_bytes,
            "peak_phase": whole.peak_phase,
            "same_place": (fast.peak_phase, fast.peak_module) == (whole.peak_phase, whole.peak_module),
            "short_peak_phase": PHASES[fast._account.trace.phases[timeline.peak(short)]],
            "line_error": line(case) / whole.peak_bytes - 1,
            "seconds": [round(middle - start, 2), round(end - middle, 2)],
        }
        print(rows[case.name], flush=True)
        record.write(NAME, {}, list(rows.values()))
    return list(rows.values())


def line(case: Case) -> int:
    """A straight line through the peaks of stacks of two and three blocks."""
    from tightfit.core.simulate import simulate

    two, three = (
        simulate(build(case, dict.fromkeys(case.depth, n)), case.batch, optimizer=case.optimizer, extrapolate=False)
        for n in (2, 3)
    )
    return two.peak_bytes + (three.peak_bytes - two.peak_bytes) * (min(case.depth.values()) - 2)
