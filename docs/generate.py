"""Write the tables of README and docs from benchmarks/results: text between `<!-- results:NAME -->` and `<!-- end -->`.

`python docs/generate.py` rewrites the files; `--check` says which are out of date and exits with 1.
"""

from __future__ import annotations

import functools
import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MARK = re.compile(r"(<!-- results:([\w.]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table.

    >>> print(table(["a", "b"], [["1", "2"]]))
    | a | b |
    |---|---|
    | 1 | 2 |
    """
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def mib(count: float) -> str:
    return f"{count / 2**20:,.1f}"


def footer(result: dict[str, Any]) -> str:
    """Where the figures come from."""
    versions = result["versions"]
    return (
        f"\n*{result['date']}, {result['device']}, {result['threads']} threads, torch {versions['torch']}, "
        f"transformers {versions['transformers']}, commit {result['commit']}.*"
    )


def demo(result: dict[str, Any]) -> str:
    rows = [
        [
            row["name"],
            mib(row["peak_bytes"]),
            mib(row["predicted_peak_bytes"]),
            mib(row["saved_bytes"]),
            f"{row['step_time']:.2f}",
            f"{row['metric']:.4f}",
        ]
        for row in result["rows"]
    ]
    header = ["recipe", "peak, MiB", "predicted, MiB", "saved for backward, MiB", "step time / stock", "accuracy"]
    return table(header, rows) + "\n" + footer(result)


def partial_embedding(result: dict[str, Any]) -> str:
    rows = []
    for task in dict.fromkeys(row["task"] for row in result["rows"]):
        own = [row for row in result["rows"] if row["task"] == task]
        first = own[0]
        error = 100 * (first["predicted_drop"] / first["measured_drop"] - 1)
        rows.append(
            [
                task,
                f"{first['kept_rows']:,} of 30,522",
                f"{spread([r['stock'] for r in own])}",
                f"{spread([r['partial_embedding'] for r in own])}",
                "yes" if all(r["identical"] for r in own) else "no",
                f"{mib(first['stock_peak_bytes'])} -> {mib(first['peak_bytes'])}",
                f"{mib(first['measured_drop'])} ({error:+.2f} %)",
                f"{first['step_time']:.3f}",
            ]
        )
    header = [
        "task",
        "rows kept",
        "stock",
        "PartialEmbedding",
        "every metric of every seed identical",
        "peak, MiB",
        "drop, MiB (error of the prediction)",
        "step time / stock",
    ]
    return table(header, rows) + "\n" + footer(result)


def vocabulary_shares(result: dict[str, Any]) -> str:
    rows = [
        [
            row["data"],
            f"{row['kept_rows']:,}",
            f"{row['published_percent']:.2f}",
            f"{row['planned_percent']:.2f}",
            f"{row['adamw_bytes_saved'] / 1e6:,.0f}",
        ]
        for row in result["rows"]
    ]
    header = ["data", "rows kept of 250,002", "parameters removed, published, %", "by plan, %", "AdamW fp32 saves, MB"]
    return table(header, rows) + "\n" + footer(result)


def plan_accuracy(result: dict[str, Any]) -> str:
    rows = [row for row in result["rows"] if "error" in row]
    kinds = {
        "peak": [r["error"] for r in rows],
        "part above the static bytes": [r["step_error"] for r in rows],
        "highest level of each phase": [error for r in rows for error in phase_errors(r).values()],
    }
    cells = []
    for title, errors in kinds.items():
        size = sorted(abs(100 * e) for e in errors)
        p95 = size[round(0.95 * (len(size) - 1))]
        under = -100 * min(0, *errors)
        cells.append([title, str(len(size)), *(f"{x:.4f}" for x in (statistics.median(size), p95, size[-1], under))])
    clear = [r for r in rows if clear_peak(r["measured_phases"])]
    right = sum(r["peak_phase"] == max(r["measured_phases"], key=r["measured_phases"].get) for r in clear)
    text = table(["relative error, %", "figures", "median", "95th percentile", "worst", "most under"], cells)
    failed = [r["name"] for r in result["rows"] if "failure" in r]
    note = f"\n\nPhase of the peak: right in {right} of {len(clear)} rows where one phase leads by over 0.1 %."
    return text + note + (f" Not simulated: {', '.join(failed)}." if failed else "") + "\n" + footer(result)


def plan_accuracy_rows(result: dict[str, Any]) -> str:
    phases = ("forward", "backward", "clip", "optimizer", "zero_grad")
    rows = []
    for row in (r for r in result["rows"] if "error" in r):
        found = phase_errors(row)
        cells = [f"{100 * row['error']:+.4f}", f"{100 * row['step_error']:+.4f}", row["peak_phase"]]
        cells += [f"{100 * found[p]:+.4f}" if p in found else "" for p in phases]
        rows.append([row["name"], mib(row["predicted"]), mib(row["measured"]), *cells])
    header = ["configuration", "predicted, MiB", "measured, MiB", "error, %", "above static, %", "phase of the peak"]
    return table([*header, *(f"{p.replace('_', ' ')}, %" for p in phases)], rows) + "\n" + footer(result)


def activations(result: dict[str, Any]) -> str:
    stock = {row["model"]: row for row in result["rows"] if row["recipe"] == "stock"}
    parts = []
    for model, base in stock.items():
        rows = []
        for row in result["rows"]:
            if row["model"] == model:
                peak = f"{row['peak_bytes'] / base['peak_bytes']:.3f}"
                saved = [f"{base[key] / row[key]:.2f}" for key in ("block_bytes", "saved_bytes")]
                rows.append([row["recipe"], mib(row["peak_bytes"]), peak, *saved])
        header = ["recipe", "peak of forward and backward above the weights, MiB", "of stock"]
        header += ["kept by the blocks, times less", "kept by the model, times less"]
        parts.append(f"**{model}, {base['batch']}**\n\n" + table(header, rows))
    return "\n\n".join(parts) + "\n" + footer(result)


def activation_time(result: dict[str, Any]) -> str:
    return by_model(result, "measured", 3)


def sampling_error(result: dict[str, Any]) -> str:
    return by_model(result, "error", 2)


def quality(result: dict[str, Any], group: str) -> str:
    """A line per recipe: its metric on every task, in points, the mean over seeds; and how far it is from its base."""
    groups = result["config"]["groups"]
    recipes = [*groups["baselines"], *groups[group]]
    own = [row for row in result["rows"] if row["recipe"] in recipes]
    tasks = {row["task"]: row["metric"] for row in own if row["recipe"] in groups[group]}
    if not tasks:
        return "*Not measured yet: `python benchmarks/run.py quality`.*"
    values: dict[tuple[str, str], dict[int, float]] = {}
    for row in own:
        values.setdefault((row["recipe"], row["task"]), {})[row["seed"]] = 100 * row["value"]
    rows, seeds = [], {len(found) for (_, task), found in values.items() if task in tasks}
    for recipe in recipes:
        base = "Lora" if recipe.startswith("Lora + ") else "stock"
        cells, differences = [], []
        for task in tasks:
            found, others = values.get((recipe, task), {}), values.get((base, task), {})
            cells.append(f"{statistics.fmean(found.values()):.1f}" if found else "-")
            # a run that is not there yet must not move the mean
            differences += [found[seed] - others[seed] for seed in found.keys() & others.keys()]
        mean = f"{statistics.fmean(differences):+.2f} to {base}" if differences and recipe != base else ""
        rows.append([recipe, *cells, mean])
    header = ["recipe", *(f"{task}, {metric}" for task, metric in tasks.items()), "mean difference"]
    count = "-".join(map(str, sorted({min(seeds), max(seeds)})))
    told = "of one seed, which says little" if max(seeds) == 1 else f"means over {count} seeds"
    return table(header, rows) + f"\n\nIn points; {told}.\n" + footer(result)


def by_model(result: dict[str, Any], key: str, digits: int) -> str:
    """A line per recipe, a column per model."""
    models = list(dict.fromkeys(row["model"] for row in result["rows"]))
    found = {(row["model"], row["recipe"]): row for row in result["rows"]}
    rows = []
    for recipe in dict.fromkeys(row["recipe"] for row in result["rows"]):
        cells = [found.get((model, recipe)) for model in models]
        rows.append([recipe, *("" if row is None else f"{row[key]:.{digits}f}" for row in cells)])
    return table(["recipe", *models], rows) + "\n" + footer(result)


def extrapolation(result: dict[str, Any]) -> str:
    rows = [
        [
            row["name"],
            "extended" if row["extended"] else "in full",
            f"{row['peak_bytes'] / 2**30:,.2f}",
            f"{row['difference_bytes']:,}",
            f"{row['largest_phase_difference']:,}",
            row["peak_phase"]
            + ("" if row["short_peak_phase"] == row["peak_phase"] else f" ({row['short_peak_phase']})"),
            f"{100 * row['line_error']:+.2f}",
        ]
        for row in result["rows"]
    ]
    header = ["model", "simulated", "peak, GiB", "peak apart, bytes", "any phase apart, bytes"]
    header += ["phase of the peak (of the short stack's)", "line through two short peaks, %"]
    return table(header, rows) + "\n" + footer(result)


def planning_cost(result: dict[str, Any]) -> str:
    whole = [row for row in result["rows"] if "process_seconds" in row]
    step = [row for row in result["rows"] if "ratio" in row]
    first = [[r["name"], f"{statistics.median(r['process_seconds']):.1f}", f"{r['rss_mib']:,.0f}"] for r in whole]
    second = [
        [r["name"], f"{r['fake_seconds']:.2f}", f"{r['simulated_seconds']:.2f}", f"{r['ratio']:.2f}"] for r in step
    ]
    text = table(["plan, in a fresh process", "seconds, imports included", "resident memory, MiB"], first)
    header = ["one step", "under FakeTensorMode alone, CPU s", "simulated, CPU s", "ratio"]
    return text + "\n\n" + table(header, second) + "\n" + footer(result)


def recommend(result: dict[str, Any]) -> str:
    rows = []
    for row in result["rows"]:
        best, *others = row["recommended"]
        rows.append(
            [
                row["model"],
                mib(row["budget_bytes"]),
                f"{best['recipe']}, {best['rows']} x {best['parts']}",
                f"{mib(best['predicted_peak_bytes'])} / {mib(best['measured_peak_bytes'])}",
                "; ".join(f"{other['recipe']}, {other['rows']} x {other['parts']}" for other in others) or "-",
                "yes" if row["under_budget"] else "no",
                f"{row['best_over_fastest']:.2f}",
                f"{row['best_over_fastest_not_exact_either']:.2f}",
                f"{row['recommend_seconds']:.0f}, {row.get('simulated_steps', '?')} steps",
            ]
        )
    header = [
        "model",
        "budget, MiB",
        "first choice, rows x parts",
        "its peak, MiB, predicted / measured",
        "other choices",
    ]
    header += [
        "all under budget",
        "step time over the fastest alike",
        "... over the fastest of all",
        "CPU s to find, steps simulated",
    ]
    note = (
        "\n\nThe fastest alike is the fastest recipe that fits and is exact where the first choice is; of all, exact "
        "or not. Exact recipes go first by design, so the last ratio may be well above 1."
    )
    return table(header, rows) + note + "\n" + footer(result)


def step_time(result: dict[str, Any]) -> str:
    rows = [
        [
            row["family"],
            row["configuration"],
            " x ".join(map(str, row["batch"])),
            f"{row['measured']:.3f} ({row['measured_least']:.3f})",
            f"{row['predicted']:.3f}",
            f"{row['error_percent']:+.1f} ({row['error_to_least_percent']:+.1f})",
        ]
        for row in result["rows"]
    ]
    sizes = [sorted(abs(row[key]) for row in result["rows"]) for key in ("error_percent", "error_to_least_percent")]
    (middle, worst), (other, other_worst) = ((statistics.median(s), s[-1]) for s in sizes)
    header = ["model", "configuration", "batch", "measured step time / stock (of the fastest steps)"]
    note = (
        f"\n\nError over {len(rows)} configurations: median {middle:.1f} %, worst {worst:.1f} % (beside the ratio of "
        f"the fastest steps: {other:.1f} %, {other_worst:.1f} %). Calibrated in "
        f"{result['config']['calibration_seconds']} s."
    )
    return table([*header, "predicted", "error, %"], rows) + note + "\n" + footer(result)


def velora_operator(result: dict[str, Any]) -> str:
    lora = {row["model"]: row for row in result["rows"] if row.get("recipe") == "Lora" and "model" in row}
    rows = []
    for row in (r for r in result["rows"] if "model" in r):
        base = lora[row["model"]]
        cells = [f"{mib(row[key])} ({row[key] / base[key]:.2f})" for key in ("saved_bytes", "peak_bytes")]
        rows.append([f"{row['model']}, {row['batch']}", row["recipe"], *cells])
    header = ["model", "recipe", "saved for backward, MiB (of Lora)", "peak above the weights, MiB (of Lora)"]
    return table(header, rows) + "\n" + footer(result)


def velora_operator_layers(result: dict[str, Any]) -> str:
    rows, sizes = [], ("kept_bytes", "temporary_bytes")
    for row in (r for r in result["rows"] if "layer" in r):
        kept, temporary = ([f"{count / 2**10:,.1f}" for count in row[key].values()] for key in sizes)
        low, high = row["of_peft_quartiles"]
        times = [f"{row['of_peft']:.2f} ({low:.2f}-{high:.2f})", f"{row['of_torch']:.2f}"]
        rows.append([row["layer"], *times, " / ".join(kept), " / ".join(temporary)])
    header = ["layer", "time / PEFT's (quartiles)", "time / torch's", "kept, KiB: torch / PEFT / Velora"]
    return table([*header, "temporary, KiB: torch / PEFT / Velora"], rows) + "\n" + footer(result)


def velora_operator_times(result: dict[str, Any]) -> str:
    rows = [
        [row["timed_model"], row["recipe"], f"{row['measured']:.2f} ({row['measured_least']:.2f})"]
        for row in result["rows"]
        if "timed_model" in row
    ]
    return table(["model", "recipe", "step time / Lora (of the fastest steps)"], rows) + "\n" + footer(result)


def sparse_adapter(result: dict[str, Any]) -> str:
    rows = []
    for row in (r for r in result["rows"] if "width" in r):
        seconds = {name: 1e3 * value for name, value in row["seconds"].items()}
        steps = [f"{seconds[name]:,.1f}" for name in ("lookup_of_all", "lookup_of_groups", "gather", "scatter")]
        own = seconds["row_adamw"]
        dense = [f"{seconds[name]:,.0f} ({seconds[name] / own:.1f})" for name in ("adamw", "fused_adamw")]
        rows.append([f"{row['width']:,}", f"{row['bank_bytes'] / 2**30:.2f}", *steps, f"{own:,.1f}", *dense])
    header = [
        "width",
        "bank, GiB",
        "all rows scored",
        "rows of 8 groups scored",
        "gather",
        "add gradients",
        "row-wise AdamW",
    ]
    header += ["torch's AdamW over all rows (times ours)", "its fused form (times ours)"]
    return table(header, rows) + "\n" + footer(result)


def sparse_adapter_device(result: dict[str, Any]) -> str:
    rows = [
        [row["device"], *(mib(n) for n in (row["peak_bytes"], row["by_category"]["host"]))]
        for row in result["rows"]
        if "device" in row
    ]
    return table(["recipe", "device peak, MiB", "host, MiB"], rows) + "\n" + footer(result)


def sparse_adapter_facts(result: dict[str, Any]) -> str:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in (r for r in result["rows"] if "facts" in r):
        found.setdefault(row["facts"], []).append(row)
    rows = []
    for name, runs in found.items():
        cells = []
        for key in ("learnt", "unseen"):
            values = [run[key] for run in runs]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        rows.append([name, *cells, mib(statistics.mean(run["peak_bytes"] for run in runs)), str(len(runs))])
    header = ["recipe", "learnt questions known", "questions never seen", "peak, MiB", "seeds"]
    return table(header, rows) + "\n" + footer(result)


def token_tune(result: dict[str, Any]) -> str:
    stock = {row["model"]: row for row in result["rows"] if row.get("recipe") == "stock" and "model" in row}
    rows = []
    for row in (r for r in result["rows"] if "model" in r):
        base = stock[row["model"]]
        cells = [f"{mib(row[key])} ({row[key] / base[key]:.3f})" for key in ("saved_bytes", "peak_bytes")]
        rows.append([row["model"], row["recipe"], *cells])
    header = [
        "model",
        "recipe",
        "saved for backward, MiB (of stock)",
        "peak above weights and optimizer, MiB (of stock)",
    ]
    return table(header, rows) + "\n" + footer(result)


def times(result: dict[str, Any], *, told_by: str, columns: dict[str, str], ratio: str) -> str:
    """A line per row that was timed (it has the key `told_by`): its `columns`, and the ratio of two step times."""
    rows = [
        [*(row[key] for key in columns), f"{row['measured']:.2f} ({row['measured_least']:.2f})"]
        for row in result["rows"]
        if told_by in row
    ]
    return table([*columns.values(), f"{ratio} (of the fastest steps)"], rows) + "\n" + footer(result)


def token_tune_language(result: dict[str, Any]) -> str:
    rows = []
    for recipe in dict.fromkeys(row["recipe"] for row in result["rows"]):
        own = [row for row in result["rows"] if row["recipe"] == recipe]
        steps, seconds = (statistics.fmean(row[key] for row in own) for key in ("steps", "cpu_seconds"))
        rows.append([recipe, f"{steps:.0f}", f"{seconds:.0f}", spread([row["loss"] for row in own])])
    return table(["recipe", "steps", "CPU seconds", "held-out loss (range over seeds)"], rows) + "\n" + footer(result)


def reversible(result: dict[str, Any]) -> str:
    rows = []
    peaks = [row for row in result["rows"] if "blocks" in row]
    base = {row["blocks"]: row for row in peaks if row["recipe"] == "Lora + Checkpointing"}
    for row in peaks:
        ratio = row["peak_bytes"] / base[row["blocks"]]["peak_bytes"]
        cells = [mib(row[key]) for key in ("saved_bytes", "planned_peak_bytes", "peak_bytes")]
        rows.append([str(row["blocks"]), row["recipe"], *cells, f"{ratio:.2f}"])
    header = ["blocks", "recipe", "saved, MiB", "planned peak", "measured peak, MiB", "of Lora + Checkpointing"]
    return table(header, rows) + "\n" + footer(result)


def reversible_start(result: dict[str, Any]) -> str:
    found = {(row["start"], row["recipe"]): row for row in result["rows"] if "start" in row}
    rows = []
    for recipe in dict.fromkeys(recipe for _, recipe in found):
        language, sentences = (found.get((model, recipe), {}) for model in ("stories260k", "MiniLM"))
        cells = [language.get("divergence"), language.get("loss"), sentences.get("divergence")]
        rows.append([recipe, *("-" if cell is None else f"{cell:.4f}" for cell in cells)])
    header = ["recipe", "Llama: KL to stock per token", "Llama: loss", "MiniLM: 1 - cosine to stock"]
    return table(header, rows) + "\n" + footer(result)


def reversible_quality(result: dict[str, Any]) -> str:
    own = [row for row in result["rows"] if "plain_loss" in row]
    rows = []
    for recipe in dict.fromkeys(row["recipe"] for row in own):
        found = [row for row in own if row["recipe"] == recipe]
        plain = [row["plain_loss"] for row in found if row["plain_loss"] is not None]
        rows.append([recipe, spread([row["loss"] for row in found]), spread(plain) if plain else "-"])
    header = ["recipe", "held-out loss (range over seeds)", "the same of the exported plain model"]
    return table(header, rows) + "\n" + footer(result)


def side(result: dict[str, Any]) -> str:
    peaks = [row for row in result["rows"] if "planned_peak_bytes" in row]
    stock = {row["model"]: row for row in peaks if row["recipe"] == "stock"}
    rows = []
    for row in peaks:
        base = stock[row["model"]]
        cells = [f"{mib(row[key])} ({row[key] / base[key]:.2f})" for key in ("saved_bytes", "planned_peak_bytes")]
        rows.append([row["model"], row["recipe"], f"{row['trainable_parameters']:,}", *cells])
    header = [
        "model",
        "recipe",
        "parameters that train",
        "saved, MiB (of stock)",
        "peak above the weights, MiB (of stock)",
    ]
    return table(header, rows) + "\n" + footer(result)


def side_images(result: dict[str, Any]) -> str:
    rows = []
    for recipe in dict.fromkeys(row["recipe"] for row in result["rows"]):
        own = [row for row in result["rows"] if row["recipe"] == recipe]
        rows.append([recipe, f"{own[0]['trainable_parameters']:,}", spread([row["accuracy"] for row in own])])
    return table(["recipe", "parameters that train", "accuracy (range over seeds)"], rows) + "\n" + footer(result)


def learnable_memory(result: dict[str, Any]) -> str:
    times = {row["recipe"]: row["step_time"] for row in result["rows"] if row["task"] is None}
    trained = [row for row in result["rows"] if row["task"] is not None]
    rows = []
    for recipe in dict.fromkeys(row["recipe"] for row in trained):
        own = [row for row in trained if row["recipe"] == recipe]
        of_task = [[row["accuracy"] for row in own if row["task"] == task] for task in result["config"]["tasks"]]
        kept = [row["earlier_logits_bit_identical"] for row in own if "earlier_logits_bit_identical" in row]
        rows.append(
            [
                recipe,
                f"{own[0]['trainable_parameters']:,}",
                *(spread(found) if found else "" for found in of_task),
                ("bit for bit" if all(kept) else "no") if kept else "one model a task",
                mib(own[0]["saved_bytes"]),
                mib(own[0]["planned_peak_bytes"]),
                f"{times[recipe]:.2f}",
            ]
        )
    header = [
        "recipe",
        "parameters that train (digits)",
        *(f"{task} (range over seeds)" for task in result["config"]["tasks"]),
    ]
    header += ["earlier tasks stay", "saved, MiB", "peak above the weights, MiB", "step time / full"]
    return table(header, rows) + "\n" + footer(result)


def recurrent_memory(result: dict[str, Any]) -> str:
    recipes = [r for r in result["config"]["recipes"] if any(row["recipe"] == r for row in result["rows"])]
    rows = []
    for count in result["config"]["segments"]:
        own = {row["recipe"]: row for row in result["rows"] if row["segments"] == count}
        cells = [own.get(recipe) for recipe in recipes]
        peaks = [
            f"{mib(row['planned_peak_bytes'])} / {mib(row['measured_peak_bytes'])}" if row else "" for row in cells
        ]
        rows.append([str(count), *peaks, *(f"{row['seconds']:.2f}" if row else "" for row in cells[:2])])
    header = ["segments", *(f"{recipe}, MiB planned / measured" for recipe in recipes)]
    header += [f"{recipe}, s" for recipe in recipes[:2]]
    return table(header, rows) + "\n" + footer(result)


def recurrent_memory_tasks(result: dict[str, Any]) -> str:
    rows = []
    for task, memory in dict.fromkeys((row["task"], row["memory"]) for row in result["rows"]):
        own = [row for row in result["rows"] if (row["task"], row["memory"]) == (task, memory)]
        seconds = statistics.fmean(row["cpu_seconds"] for row in own)
        rows.append([task, memory, spread([row["accuracy"] for row in own]), str(len(own)), f"{seconds:.0f}"])
    return table(["task", "", "accuracy (range)", "seeds", "CPU seconds"], rows) + "\n" + footer(result)


def recurrent_memory_language(result: dict[str, Any]) -> str:
    rows = []
    for recipe in result["config"]["recipes"]:
        own = [row for row in result["rows"] if row["recipe"] == recipe]
        if own:
            seconds = statistics.fmean(row["cpu_seconds"] for row in own)
            found = [spread([row[key] for row in own]) for key in ("perplexity", "train_perplexity")]
            rows.append([recipe, *found, f"{statistics.fmean(row['steps'] for row in own):.0f}", f"{seconds:.0f}"])
    header = ["", "test perplexity (range over seeds)", "training text", "steps", "CPU seconds"]
    return table(header, rows) + "\n" + footer(result)


def token_turing_machine(result: dict[str, Any]) -> str:
    trained = [row for row in result["rows"] if "accuracy" in row]
    heads = dict.fromkeys(row["head"] for row in trained)
    rows = [[head, spread([row["accuracy"] for row in trained if row["head"] == head])] for head in heads]
    return (
        table(["head", f"accuracy at {result['config']['steps']} steps (range over seeds)"], rows)
        + "\n"
        + footer(result)
    )


def token_turing_machine_cost(result: dict[str, Any]) -> str:
    rows = [
        [
            row["head"],
            f"{row['steps']}",
            f"{1000 * row['seconds_a_step']:.1f}",
            mib(row["saved_bytes"]),
            mib(row["planned_peak_bytes"]),
        ]
        for row in result["rows"]
        if "accuracy" not in row
    ]
    header = ["head", "steps", "ms of CPU for each", "saved, MiB", "peak above the weights, MiB"]
    return table(header, rows) + "\n" + footer(result)


def composition(result: dict[str, Any]) -> str:
    """A grid of all pairs, with the reasons of the refused ones below."""
    refusals: dict[frozenset[str], list[tuple[str, str | None]]] = {}
    for row in result["rows"]:
        refusals.setdefault(frozenset(row["pair"]), []).append((row["model"], row["refused"]))
    names = [row["pair"][0] for row in result["rows"] if row["model"] == "Llama" and len(row["pair"]) == 1]
    reasons: list[str] = []

    def cell(one: str, other: str) -> str:
        tried = refusals.get(frozenset([one, other]), [])
        found = list(dict.fromkeys(_reason(why) for _, why in tried if why is not None and one != other))
        reasons.extend(reason for reason in found if reason not in reasons)
        yes = ["yes"] if any(why is None for _, why in tried) else []
        return " / ".join([*yes, *(f"{reasons.index(reason) + 1}" for reason in found)])

    grid = [[f"**{one}**", *(cell(one, other) for other in names[:at])] for at, one in enumerate(names)]
    notes = "\n".join(f"{number}. {reason}" for number, reason in enumerate(reasons, 1))
    alone = [
        [name, model, _reason(why)] for name in names for model, why in refusals[frozenset([name])] if why is not None
    ]
    grid = [[*row, *[""] * (len(names) - len(row))] for row in grid[1:]]
    parts = [
        table(["", *names[:-1]], grid),
        "A number is why a pair is refused; with yes before it, on some models only:",
        notes,
        f"Alone, of {', '.join(result['config']['models'])}, these do not work:",
        table(["method", "model", "because"], alone),
    ]
    return "\n\n".join(parts) + "\n" + footer(result)


def _reason(refusal: str) -> str:
    """A refusal without the names of modules and methods, to be told of many pairs."""
    claimed = re.findall(r"\(slot '([^']*)'\)", refusal)
    if claimed:
        return f"both need the same places (slot {', '.join(dict.fromkeys(claimed))})"
    text = re.sub(r"^\w+: (For\w+|\w+For\w+ )?(is not supported: )?", "", refusal)
    text = re.sub(r"none of its \d+ layers", "none of its layers", text)
    return re.sub(r" \([^()]*and \d+ more\)", "", text)


def phase_errors(row: dict[str, Any]) -> dict[str, float]:
    """Signed relative error of the highest level of each phase."""
    return {p: row["predicted_phases"][p] / level - 1 for p, level in row["measured_phases"].items()}


def clear_peak(phases: dict[str, int]) -> bool:
    """Whether the highest phase is more than 0.1 % above the next."""
    first, second = sorted(phases.values())[-1:-3:-1]
    return first > second * 1.001


def spread(values: list[float]) -> str:
    """Mean and range over seeds."""
    mean = statistics.fmean(values)
    return f"{mean:.4f} ({min(values):.4f}-{max(values):.4f})" if len(values) > 1 else f"{mean:.4f}"


RENDERERS: dict[str, Callable[[dict[str, Any]], str]] = {
    "demo": demo,
    "partial_embedding": partial_embedding,
    "composition": composition,
    "learnable_memory": learnable_memory,
    "token_turing_machine": token_turing_machine,
    "token_turing_machine.cost": token_turing_machine_cost,
    "recurrent_memory": recurrent_memory,
    "recurrent_memory_tasks": recurrent_memory_tasks,
    "recurrent_memory_language": recurrent_memory_language,
    "vocabulary_shares": vocabulary_shares,
    "plan_accuracy": plan_accuracy,
    "plan_accuracy.rows": plan_accuracy_rows,
    "activations": activations,
    "activation_time": activation_time,
    "quality.activations": functools.partial(quality, group="activations"),
    "quality.tokens": functools.partial(quality, group="tokens"),
    "quality.reversible": functools.partial(quality, group="reversible"),
    "quality.side": functools.partial(quality, group="side"),
    "sampling_error": sampling_error,
    "extrapolation": extrapolation,
    "planning_cost": planning_cost,
    "recommend": recommend,
    "reversible": reversible,
    "reversible.times": functools.partial(
        times, told_by="against", columns={"recipe": "recipe", "against": "against"}, ratio="step time"
    ),
    "reversible_quality": reversible_quality,
    "reversible_quality.start": reversible_start,
    "sparse_adapter": sparse_adapter,
    "sparse_adapter.device": sparse_adapter_device,
    "sparse_adapter.facts": sparse_adapter_facts,
    "step_time": step_time,
    "token_tune": token_tune,
    "token_tune.times": functools.partial(
        times,
        told_by="timed_model",
        columns={"timed_model": "model", "recipe": "recipe"},
        ratio="step time / stock",
    ),
    "token_tune_language": token_tune_language,
    "side": side,
    "side.times": functools.partial(
        times,
        told_by="seconds",
        columns={"model": "model (fewer blocks)", "recipe": "recipe"},
        ratio="step time / stock",
    ),
    "side_images": side_images,
    "velora_operator": velora_operator,
    "velora_operator.layers": velora_operator_layers,
    "velora_operator.times": velora_operator_times,
}


def rendered(text: str) -> str:
    """The text with every marked section made anew; a section without a result file stays as it is."""

    def section(match: re.Match[str]) -> str:
        path = RESULTS / f"{match[2].split('.')[0]}.json"
        if not path.exists():
            return match[0]
        return f"{match[1]}{RENDERERS[match[2]](json.loads(path.read_text()))}\n{match[4]}"

    return MARK.sub(section, text)


def main(check: bool) -> int:
    stale = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        old = path.read_text(encoding="utf-8")
        new = rendered(old)
        if new != old:
            stale.append(path.relative_to(ROOT))
            if not check:
                path.write_text(new, encoding="utf-8")
    for path in stale:
        print(f"{'out of date' if check else 'written'}: {path}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
