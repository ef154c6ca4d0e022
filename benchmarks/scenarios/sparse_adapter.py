"""SparseAdapter: what the host does for one layer and one batch, and what the device holds.

Host: 512 tokens of width 1,024 in float32, one thread, process CPU time. Tokens come in clusters, so that they share
rows as tokens of real text do. Looking up rows (with and without groups), gathering the union, adding its gradients,
and the row-wise AdamW of 5 % of the rows, beside torch's AdamW over the whole bank (its default and its fused form);
optimizers take turns.

Device: planned peaks of a Llama's step, on models without weights, and the allocator's peak of real steps of a shorter
one. Where the model is on the CPU too, the rows are in memory of their own, which the allocator does not count.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import record

NAME = "sparse_adapter"
QUICK = False
WIDTHS = (6144, 16384, 65536)
ON_DEVICE = (16384, 32768, 65536)
SIZE, TOKENS, TOP_K, TOUCHED, CLUSTERS = 1024, 512, 64, 0.05, 24
ROUNDS = 5


def tokens() -> Any:
    """(TOKENS, SIZE) hidden states in clusters."""
    import torch

    centres = torch.randn(CLUSTERS, SIZE)
    return centres[torch.randint(CLUSTERS, (TOKENS,))] + 0.4 * torch.randn(TOKENS, SIZE)


def timed(step: Callable[[], Any], rounds: int) -> float:
    """Median seconds after one to warm up."""
    found = []
    for _ in range(rounds + 1):
        start = time.process_time()
        step()
        found.append(time.process_time() - start)
    return statistics.median(found[1:])


def host_row(width: int, rounds: int = ROUNDS) -> dict[str, Any]:
    """Seconds of everything that the host does for one layer."""
    import torch

    from tightfit import SparseAdapter
    from tightfit.methods.sparse_adapter.bank import HostBank, Shape
    from tightfit.methods.sparse_adapter.traffic import Traffic
    from tightfit.ops.sparse_rows import AdamW, group_scores, resident, top_rows, top_rows_of_groups

    torch.manual_seed(0)
    recipe = SparseAdapter(width=width, top_k=TOP_K, groups="auto")
    groups, probe, cap = recipe.group_count, recipe.probed_groups, recipe.resident_rows
    bank = HostBank(Shape(width, SIZE, torch.float32, groups, "memory"), hollow=False)
    bank.draw(0.02, (0, 0))
    traffic, q = Traffic(), tokens()
    work, router, cpu = traffic.work, torch.from_numpy(bank.router), torch.device("cpu")

    def grouped() -> Any:
        return top_rows_of_groups(q, bank.keys, TOP_K, group_scores(q, router, work), probe, work)

    seconds = {"lookup_of_groups": timed(grouped, rounds)}
    seconds["lookup_of_all"] = timed(lambda: top_rows(q, bank.keys, TOP_K, work), max(1, rounds // 2))
    chosen = grouped()
    seconds["union"] = timed(lambda: resident(*chosen, None, width, cap), rounds)
    found = resident(*chosen, None, width, cap)
    seconds["gather"] = timed(lambda: traffic.fetch(bank, found, cap, torch.float32, cpu), rounds)
    grad = torch.randn(len(found.rows), 2, SIZE)
    seconds["scatter"] = timed(lambda: bank.add_grad(found.rows, grad), rounds)
    bank.drop_grad()
    return {
        "width": width,
        "groups": groups,
        "probe": probe,
        "rows_wanted": found.wanted,
        "rows_resident": len(found.rows),
        "bank_bytes": bank.shape.nbytes,
        "scratch_bytes": work.nbytes,
        "seconds": seconds | optimizers(bank, work, AdamW(), rounds),
    }


def optimizers(bank: Any, work: Any, settings: Any, rounds: int) -> dict[str, float]:
    """Seconds of the row-wise step and of torch's over all rows, in turns."""
    import numpy as np
    import torch

    width = bank.shape.width
    touched = np.sort(np.random.default_rng(0).choice(width, int(TOUCHED * width), replace=False))
    grad = torch.randn(len(touched), 2, SIZE)
    dense = torch.nn.Parameter(torch.zeros(width, 2 * SIZE))
    dense.grad = torch.randn(width, 2 * SIZE)
    stock = {name: torch.optim.AdamW([dense], lr=1e-4, fused=name == "fused_adamw") for name in DENSE}
    found: dict[str, list[float]] = {name: [] for name in ("row_adamw", *stock)}
    for _ in range(rounds + 1):
        bank.add_grad(touched, grad)
        start = time.process_time()
        bank.update(1e-4, 1.0, settings, work)
        found["row_adamw"].append(time.process_time() - start)
        for name, optimizer in stock.items():
            start = time.process_time()
            optimizer.step()
            found[name].append(time.process_time() - start)
    return {name: statistics.median(times[1:]) for name, times in found.items()}


DENSE = ("adamw", "fused_adamw")


def llama(blocks: int) -> Any:
    """The config of a Llama of width 1,024."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=SIZE, intermediate_size=2816, num_hidden_layers=blocks, num_attention_heads=16, vocab_size=8000
    )


def measured_row(width: int, blocks: int = 2) -> dict[str, Any]:
    """The allocator's peak of a real step (the second), the planned one, and what the rows take on the host."""
    import torch
    from transformers import LlamaForCausalLM

    import tightfit
    from tightfit.core.memory import allocator_peak
    from tightfit.core.simulate import example_batch

    torch.manual_seed(0)
    model = LlamaForCausalLM(llama(blocks)).train()
    batch = example_batch(model, 2, TOKENS // 2, padded=False)
    recipe = tightfit.SparseAdapter(width=width, groups="auto")
    planned = tightfit.plan(model, recipe, batch=batch)
    applied = tightfit.apply(model, recipe)
    optimizer = applied.optimizer(torch.optim.AdamW, lr=1e-4)

    def step() -> None:
        applied.model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    row = {"measured": width, "peak_bytes": allocator_peak(step), "planned_peak_bytes": planned.peak_bytes}
    return row | {"host_bytes": planned.by_category["host"]}


def device_rows(widths: tuple[int, ...] = ON_DEVICE, blocks: int = 8) -> list[dict[str, Any]]:
    """Planned peaks and host bytes of a Llama of width 1,024, beside the stock step and LoRA."""
    import tightfit
    from tightfit import Checkpointing, Lora, SparseAdapter, chain

    model = tightfit.skeleton(llama(blocks), task="causal-lm")
    recipes = {"stock": chain(), "Lora": Lora()}
    for width in widths:
        recipes[f"SparseAdapter, {width:,} rows"] = SparseAdapter(width=width, groups="auto")
    refetch = SparseAdapter(width=widths[-1], groups="auto", retain="refetch")
    recipes[f"SparseAdapter, {widths[-1]:,} rows, refetched"] = refetch
    recipes[f"SparseAdapter, {widths[-1]:,} rows, refetched + Checkpointing"] = chain(refetch, Checkpointing())
    rows = []
    for name, recipe in recipes.items():
        plan = tightfit.plan(model, recipe, batch=(2, TOKENS // 2))
        rows.append({"device": name, "peak_bytes": plan.peak_bytes, "by_category": plan.by_category})
        print(rows[-1], flush=True)
    return rows


def save(rows: list[dict[str, Any]]) -> None:
    settings = {"size": SIZE, "tokens": TOKENS, "top_k": TOP_K, "touched": TOUCHED, "rounds": ROUNDS}
    record.write(NAME, settings, rows)


def run() -> list[dict[str, Any]]:
    """Host, then device; each row is written as it is made, and the next call goes on."""
    import torch

    torch.set_num_threads(1)
    rows = record.rows(NAME)
    for width in WIDTHS:
        if not any(row.get("width") == width for row in rows):
            rows.append(host_row(width))
            save(rows)
            print(rows[-1], flush=True)
    if not any("device" in row for row in rows):
        rows += device_rows()
        save(rows)
    for width in ON_DEVICE:
        if not any(row.get("measured") == width for row in rows):
            rows.append(measured_row(width))
            save(rows)
            print(rows[-1], flush=True)
    return rows
