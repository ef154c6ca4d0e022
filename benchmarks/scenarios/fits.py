"""What fits under a memory cap that the system enforces: the largest batch and the longest row of each recipe.

A search without weights says how far a recipe reaches; processes of their own then take real steps, there and beyond,
that may not have more memory than the cap allows (RLIMIT_DATA). A step that asks for more fails. Batches are padded, as
those of the search: the last row is a quarter shorter.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import record
import torch
from recipes import CHECKPOINTING, FUSED, LORA, MAIN

NAME = "fits"
QUICK = False
CAP = 512 * 2**20
ROWS_OF = 256
LLAMA = {"hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 4, "num_hidden_layers": 6}
RECIPES: dict[str, list[Any]] = MAIN | {"Lora + FusedOps + Checkpointing": [*LORA, *FUSED, *CHECKPOINTING]}
SLACK = 2**22
"""What a process may take beside tensors: its own objects, and what the heap cannot give back."""


def model(*, meta: bool) -> Any:
    """A small Llama, in training mode."""
    import transformers as hf

    torch.manual_seed(0)
    with torch.device("meta" if meta else "cpu"):
        config = hf.LlamaConfig(**LLAMA, vocab_size=8_000, max_position_embeddings=2**16)
        return hf.LlamaForCausalLM(config).train()


def capped_step(recipe: str, rows: int, length: int) -> None:
    """One training step that may take no more than the cap, weights, gradients and optimizer state among it."""
    import resource

    import tightfit
    from tightfit.core.memory import live_bytes
    from tightfit.core.simulate import example_batch

    torch.set_num_threads(1)
    applied = tightfit.apply(model(meta=False), tightfit.Recipe.from_list(RECIPES[recipe]))
    optimizer = torch.optim.AdamW(applied.parameters())

    def step(rows: int, length: int) -> None:
        applied.model(**example_batch(applied.model, rows, length)).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step(1, 16)  # what is loaded or made once, the optimizer's state too
    with open("/proc/self/status") as status:
        taken = next(int(line.split()[1]) for line in status if line.startswith("VmData")) * 1024
    limit = taken - live_bytes() + CAP + SLACK
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        step(rows, length)
    except (RuntimeError, MemoryError) as error:
        if "memory" not in str(error).lower() and not isinstance(error, MemoryError):
            raise
        print("too large")
    else:
        print("fits")


def fits(recipe: str, rows: int, length: int) -> bool:
    """Whether a real step of that size stays below the cap, in a process of its own."""
    code = f"import fits; fits.capped_step({recipe!r}, {rows}, {length})"
    # large blocks go back to the system when they are freed, or the heap's holes would count
    env = {"PYTHONPATH": ":".join(p for p in sys.path if p), "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    if run.returncode or run.stdout.strip() not in ("fits", "too large"):
        raise RuntimeError(f"{recipe} {rows} x {length}: {run.stdout}{run.stderr}")
    return run.stdout.strip() == "fits"


def reach(recipe: str, kind: str) -> dict[str, Any]:
    """The planned largest size, and the real ones around it: the largest that fits, the smallest that does not."""
    import tightfit

    chain, built = tightfit.Recipe.from_list(RECIPES[recipe]), model(meta=True)
    if kind == "rows":
        planned = tightfit.largest_batch(built, chain, length=ROWS_OF, budget=CAP, elsewhere=True)
    else:
        planned = tightfit.longest_sequence(built, chain, batch_size=1, budget=CAP, elsewhere=True)

    def real(size: int) -> bool:
        return fits(recipe, size, ROWS_OF) if kind == "rows" else fits(recipe, 1, size)

    stride, low = max(1, planned // 50), planned
    if real(low):
        while real(low + stride):
            low += stride
    else:
        low -= stride
        while low > 0 and not real(low):
            low -= stride
    return {"planned": planned, "fits": low, "does_not_fit": low + stride}


def run() -> list[dict[str, Any]]:
    """One row per recipe and kind of size; resumes."""
    config = {"cap_bytes": CAP, "model": LLAMA, "length": ROWS_OF, "recipes": RECIPES}
    rows = record.rows(NAME, config)
    done = {(row["recipe"], row["kind"]) for row in rows}
    for kind in ("rows", "length"):
        for recipe in RECIPES:
            if (recipe, kind) not in done:
                rows.append({"recipe": recipe, "kind": kind, **reach(recipe, kind)})
                print(rows[-1], flush=True)
                record.write(NAME, config, rows)
    return rows
