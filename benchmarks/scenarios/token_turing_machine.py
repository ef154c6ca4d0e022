"""TokenTuringStream on streams of 64 steps: recall of the last marked symbol, and what a step costs.

Every step brings a few tokens of noise; in some steps one of them is a marked symbol. The label is the last symbol that
was shown. The mean of all tokens knows which symbols were shown, and not which came last.
"""

from __future__ import annotations

import statistics
import time
from types import SimpleNamespace
from typing import Any

import record
import torch
import torch.nn.functional as F
from torch import nn

NAME = "token_turing_machine"
QUICK = False
SEEDS = (0, 1, 2)
SETTINGS: dict[str, Any] = {
    "width": 32,
    "tokens_of_a_step": 4,
    "symbols": 8,
    "shown": 4,
    "steps": 64,
    "noise": 0.5,
    "batch": 32,
    "rate": 2e-3,
    # (steps of a stream, batches) in turn
    "curriculum": [[4, 300], [8, 200], [16, 150], [32, 120], [64, 100]],
    "eval": 512,
    "stream": {"tokens": 4, "memory": 8, "layers": 1, "mlp": 64, "heads": 4},
    "lengths": [8, 16, 32, 64],
    "rounds": 7,
}
HEADS: dict[str, dict[str, Any] | None] = {
    "mean pooling": None,
    "transformer unit": {},
    "simplified unit": {"unit": "simplified"},
    "erase and add": {"write": "erase_add"},
    "without positions": {"positions": False},
}
TIMED = ("mean pooling", "transformer unit", "transformer unit, stored")


def streams(count: int, steps: int, settings: dict[str, Any], generator: torch.Generator):
    """(x (B, T, N, d), the last symbol shown (B,)), symbols in different steps."""
    codes = torch.randn(settings["symbols"], settings["width"], generator=torch.Generator().manual_seed(99))
    n, shown = settings["tokens_of_a_step"], min(settings["shown"], steps)
    x = settings["noise"] * torch.randn(count, steps, n, settings["width"], generator=generator)
    places = torch.rand(count, steps, generator=generator).argsort(1)[:, :shown].sort(1).values
    symbols = torch.randint(settings["symbols"], (count, shown), generator=generator)
    which = torch.randint(n, (count, shown), generator=generator)
    rows = torch.arange(count)[:, None]
    x[rows, places, which] = codes[symbols]
    return x, symbols[:, -1]


class Reader(nn.Module):
    """A stream or the mean, with a classifier."""

    def __init__(self, kind: dict[str, Any] | None, settings: dict[str, Any], *, replay: bool = True):
        super().__init__()
        from tightfit.nn import TokenTuringStream

        width = settings["width"]
        self.stream = self.inner = None
        if kind is None:
            self.inner = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, 4 * width))
        else:
            fields = {**settings["stream"], **kind, "replay": replay, "inputs": settings["tokens_of_a_step"]}
            self.stream = TokenTuringStream(width, **fields)
        wide = 4 * width if kind is None else width
        self.head = nn.Sequential(nn.Linear(wide, 4 * width), nn.GELU(), nn.Linear(4 * width, settings["symbols"]))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> SimpleNamespace:
        """Loss and logits; a stream is read off at its end."""
        pooled = self.inner(x).mean((1, 2)) if self.stream is None else self.stream(x)[0][:, -1].mean(1)
        logits = self.head(pooled)
        return SimpleNamespace(loss=F.cross_entropy(logits, labels), logits=logits)


@torch.no_grad()
def accuracy(model: Reader, settings: dict[str, Any], steps: int) -> float:
    """Share of streams whose last symbol is named, of others than in training."""
    generator = torch.Generator().manual_seed(12345)
    x, labels = streams(settings["eval"], steps, settings, generator)
    model.eval()
    right = [model(a, b).logits.argmax(-1) == b for a, b in zip(x.split(128), labels.split(128))]
    return float(torch.cat(right).float().mean())


def train(kind: dict[str, Any] | None, settings: dict[str, Any], seed: int) -> tuple[Reader, float]:
    """(the model, seconds) after the curriculum."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    model = Reader(kind, settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings["rate"], weight_decay=0.01)
    start = time.perf_counter()
    total, at = sum(count for _, count in settings["curriculum"]), 0
    for steps, count in settings["curriculum"]:
        for _ in range(count):
            at += 1
            for group in optimizer.param_groups:
                group["lr"] = settings["rate"] * min(1.0, at / 50) * (1 - 0.9 * at / total)
            x, labels = streams(settings["batch"], steps, settings, generator)
            model.train()(x, labels).loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return model, time.perf_counter() - start


def cost(name: str, steps: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Time and planned bytes of a training step over streams of that length."""
    from tightfit.core.simulate import simulate

    kind = None if name == "mean pooling" else HEADS[name.removesuffix(", stored")]
    torch.manual_seed(0)
    model = Reader(kind, settings, replay=not name.endswith("stored"))
    x, labels = streams(settings["batch"], steps, settings, torch.Generator().manual_seed(0))
    batch = {"x": x, "labels": labels}
    seconds = []
    for _ in range(settings["rounds"]):
        start = time.process_time()  # other work on the machine does not count
        model(**batch).loss.backward()
        seconds.append(time.process_time() - start)
        model.zero_grad()
    found = simulate(model, batch, optimizer="sgd")
    return {
        "head": name,
        "steps": steps,
        "seconds_a_step": statistics.median(seconds[1:]) / steps,
        "planned_peak_bytes": found.peak_bytes - found.by_category["weights"],
        "saved_bytes": found.saved_bytes,
        "input_bytes": x.nbytes,
    }


def run(settings: dict[str, Any] = SETTINGS, seeds: tuple[int, ...] = SEEDS, name: str = NAME) -> list[dict[str, Any]]:
    """One row per length of what it costs, and one per head and seed of what it learns; resumes."""
    torch.set_num_threads(1)
    config = {**settings, "heads": HEADS}
    rows = record.rows(name, config)

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        record.write(name, config, rows)
        print(row, flush=True)

    done = {(row["head"], row.get("steps"), row.get("seed")) for row in rows}
    for steps in settings["lengths"]:
        for head in TIMED:
            if (head, steps, None) not in done:
                add(cost(head, steps, settings))
    for seed in seeds:
        for head, kind in HEADS.items():
            if (head, settings["steps"], seed) in done:
                continue
            model, seconds = train(kind, settings, seed)
            own = {"head": head, "steps": settings["steps"], "seed": seed, "seconds": seconds}
            add({**own, "accuracy": accuracy(model, settings, settings["steps"])})
    return rows
