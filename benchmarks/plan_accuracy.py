"""Predicted against measured peak of one training step, over many configurations.

    python benchmarks/plan_accuracy.py                     # every configuration without a result yet
    python benchmarks/plan_accuracy.py --only "bert*"      # some of them
    python benchmarks/plan_accuracy.py --summary           # the figures from the result file

Each configuration runs in a fresh process: build the model, simulate the step, then run it warm under the profiler
and take the running maximum of the allocator's events, for the step and for each phase. Results are appended to
results/plan_accuracy.json as they come, so an interrupted run continues where it stopped.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "plan_accuracy.json"
PHASES = ("forward", "backward", "clip", "optimizer", "zero_grad")
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
    return rows


# -- one configuration, in a process of its own --------------------------------------------------------------------


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
            "lora": tightfit.Lora(),
            "checkpointing": tightfit.Checkpointing(),
        }
        model = tightfit.apply(model, tightfit.chain(*(known[name] for name in c["recipe"].split("+")))).model
    return model.train()


def run_one(c: dict) -> dict:
    """Predict, then measure."""
    import gc

    import torch

    from tightfit.core import memory
    from tightfit.core.simulate import example_batch, simulate
    from tightfit.core.simulate.optimizers import make_optimizer

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = build(c)
    batch = example_batch(model, c["batch"], c["length"], padded=c["mask"] == "padded")
    if c["mask"] == "absent":
        batch.pop("attention_mask", None)
    autocast = torch.bfloat16 if c["autocast"] else None
    start = time.perf_counter()
    found = simulate(
        model, batch, optimizer=c["optimizer"], clip=c["clip"], autocast=autocast, accumulate=c["accumulate"]
    )
    seconds = time.perf_counter() - start
    optimizer = make_optimizer(c["optimizer"], model.parameters(), "cpu")

    def step(phase=torch.profiler.record_function) -> None:
        for _ in range(c["accumulate"]):
            with phase("phase:forward"), torch.autocast("cpu", dtype=torch.bfloat16, enabled=c["autocast"]):
                loss = model(**batch).loss
            with phase("phase:backward"):
                loss.backward()
        if c["clip"] is not None:
            with phase("phase:clip"):
                torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], c["clip"])
        with phase("phase:optimizer"):
            optimizer.step()
        with phase("phase:zero_grad"):
            optimizer.zero_grad()

    step()
    gc.collect()
    gc.disable()
    before = memory.live_bytes()
    measured, phases = profile(step, before)
    predicted = {name: level for name, level in found.phases.items() if name != "recompute"}
    if "recompute" in found.phases:
        predicted["backward"] = max(predicted["backward"], found.phases["recompute"])
    return {
        "config": c,
        "versions": versions(),
        "predicted": found.peak_bytes,
        "measured": measured,
        "error": found.peak_bytes / measured - 1,
        "static": before,
        "static_predicted": found.static_bytes,
        "step_error": (found.peak_bytes - measured) / max(1, measured - before),
        "peak_phase": "backward" if found.peak_phase == "recompute" else found.peak_phase,
        "peak_module": found.peak_module,
        "peak_operator": found.peak_operator,
        "predicted_phases": predicted,
        "measured_phases": phases,
        "slack": found.slack_bytes,
        "notes": list(found.notes),
        "seconds": round(seconds, 2),
    }


def profile(step, before: int) -> tuple[int, dict[str, int]]:
    """Peak of the step and of its phases from the allocator's events."""
    from tightfit.core.memory import allocation_profile

    with allocation_profile() as run:
        step()
    events = run.profiler.kineto_results.events()
    spans = sorted(
        (e.start_ns(), e.start_ns() + e.duration_ns(), e.name()[6:]) for e in events if e.name().startswith("phase:")
    )
    level, peak, phases = before, before, {}
    at = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        while at < len(spans) and event.start_ns() >= spans[at][0]:
            phases[spans[at][2]] = max(level, phases.get(spans[at][2], 0))
            at += 1
        level += event.nbytes()
        peak = max(peak, level)
        if at:
            name = spans[at - 1][2]
            phases[name] = max(level, phases.get(name, 0))
    return peak, phases


def versions() -> dict[str, str]:
    """Versions the figures belong to."""
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "peft", "tightfit")}


# -- the whole run ---------------------------------------------------------------------------------------------------


def load() -> dict[str, dict]:
    """Results so far, by name."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def store(results: dict[str, dict]) -> None:
    """Replace the result file in one step."""
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    part = RESULTS.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(part, RESULTS)


def percentile(values: list[float], share: float) -> float:
    """The value that `share` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]


def summary(results: dict[str, dict]) -> str:
    """Median, 95th percentile and worst errors, in per cent."""
    rows = [r for r in results.values() if "error" in r]
    if not rows:
        return "no results"

    def line(title: str, errors: list[float]) -> str:
        size = [abs(e) * 100 for e in errors]
        return (
            f"{title:34s} n={len(size):4d}  median {statistics.median(size):.4f} %  "
            f"p95 {percentile(size, 0.95):.4f} %  worst {max(size):.4f} %  most under {min(errors) * 100:+.4f} %"
        )

    phases = [
        (r["predicted_phases"][p] / level - 1) for r in rows for p, level in r["measured_phases"].items() if p in PHASES
    ]
    decided = [r for r in rows if clear_peak(r["measured_phases"])]
    right = sum(r["peak_phase"] == max(r["measured_phases"], key=r["measured_phases"].get) for r in decided)
    lines = [
        line("peak", [r["error"] for r in rows]),
        line("part above the static bytes", [r["step_error"] for r in rows]),
        line("maxima of phases", phases),
        f"phase of the peak right: {right} of {len(decided)} (where two phases differ by more than 0.1 %)",
    ]
    failed = [name for name, r in results.items() if "error" not in r]
    return "\n".join(lines + [f"FAILED {name}: {results[name]['failure']}" for name in failed])


def clear_peak(phases: dict[str, int]) -> bool:
    """Whether the highest phase is more than 0.1 % above the next."""
    first, second = sorted(phases.values())[-1:-3:-1]
    return first > second * 1.001


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", help="pattern of configuration names")
    parser.add_argument("--again", action="store_true", help="run configurations that have a result already")
    parser.add_argument("--summary", action="store_true", help="print the figures and run nothing")
    parser.add_argument("--worst", type=int, default=0, help="print this many rows with the largest errors")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print("RESULT " + json.dumps(run_one({**DEFAULTS, **json.loads(options.one)})))
        return
    results = load()
    for name, settings in configurations().items() if not options.summary else ():
        if options.only and not fnmatch.fnmatch(name, options.only):
            continue
        if "error" in results.get(name, {}) and not options.again:
            continue
        command = [sys.executable, __file__, "--one", json.dumps(settings)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = [row for row in done.stdout.splitlines() if row.startswith("RESULT ")]
        if found:
            results[name] = json.loads(found[0][7:])
            row = results[name]
            print(f"{row['error'] * 100:+9.4f} % {row['step_error'] * 100:+9.4f} %  {name}", flush=True)
        else:
            last = done.stderr.strip().splitlines()[-1:]
            results[name] = {"config": settings, "failure": f"exit code {done.returncode} {' '.join(last)}"}
            print(f"FAILED  {name}: {results[name]['failure']}", flush=True)
        store(results)
    for name, row in sorted(results.items(), key=lambda item: -abs(item[1].get("error", 0)))[: options.worst]:
        print(f"{row.get('error', 0) * 100:+9.4f} % {row.get('step_error', 0) * 100:+9.4f} %  {name}")
    print(summary(results))


if __name__ == "__main__":
    main()
