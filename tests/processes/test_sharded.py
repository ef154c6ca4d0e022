"""Models under `fully_shard` in bf16 with gradients summed in fp32: taken up from a checkpoint as the unbroken run."""

from __future__ import annotations

import pytest
import torch
from test_processes import launch

pytestmark = pytest.mark.slow

KEYS = [
    "stock/llama",
    "lora/llama",
    "fused-ops/llama",
    "mesa/llama",
    "velora/llama",
    "token-tune/llama",
    "partial-embedding/llama",
    "partial-embedding/llama-tied",
    "partial-embedding-split/llama",
    "reversible/llama",
    "ladder-side/llama",
    "recurrent-memory/llama",
    "fused-ops-mesa-wta-crs/llama",
    "learnable-memory/vit",
    "wta-crs-running/llama",
]
OWN_SCORES = "wta-crs-running/llama"
"""Each process keeps scores of its own, of which a checkpoint for all of them holds the first one's."""
NEAR = 1e-2
"""Of a loss in bf16 to that in fp32, as a share of it."""


def test_a_sharded_run_in_mixed_precision_is_taken_up(tmp_path):
    results = launch("sharded.py", "bf16", KEYS, tmp_path, timeout=600)
    for key, both in zip(KEYS, results):
        for rank, found in enumerate(both):
            assert "error" not in found, f"{key}: {found['trace']}"
            whole = found["whole"]
            losses = torch.tensor(found["first"] + whole["losses"])
            assert not torch.equal(losses, torch.tensor(found["fp32"])), f"{key} ran in fp32"
            torch.testing.assert_close(
                losses, torch.tensor(found["fp32"]), rtol=NEAR, atol=0, msg=lambda m, key=key: f"{key}: {m}"
            )
            for way in ("dcp", "full"):
                equal = found[way]["losses"] == whole["losses"] and _same(found[way]["after"], whole["after"])
                assert equal or (key == OWN_SCORES and way == "dcp"), f"{key}, {way}, process {rank}"
        apart = [n for n, v in both[0]["whole"]["after"].items() if not torch.equal(v, both[1]["whole"]["after"][n])]
        assert all(name.startswith("part:") for name in apart), f"{key}: {apart[:3]}"


def _same(one: dict, other: dict) -> bool:
    return set(one) == set(other) and all(torch.equal(value, other[name]) for name, value in one.items())
