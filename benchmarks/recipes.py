"""What the recipes of several scenarios are made of, as lines of a recipe file."""

from __future__ import annotations

from typing import Any

LORA: list[dict[str, Any]] = [{"Lora": {}}]
FUSED: list[dict[str, Any]] = [{"FusedOps": {}}]
ATTENTION: list[dict[str, Any]] = [{"Mesa": {"attention": True}}]
CHECKPOINTING: list[dict[str, Any]] = [{"Checkpointing": {}}]
MAIN: dict[str, list[dict[str, Any]]] = {
    "stock": [],
    "Checkpointing": CHECKPOINTING,
    "FusedOps": FUSED,
    "FusedOps + Mesa, attention": [*FUSED, *ATTENTION],
    "FusedOps + Checkpointing": [*FUSED, *CHECKPOINTING],
    "WtaCrs": [{"WtaCrs": {}}],
    "TokenTune 0.2": [{"TokenTune": {"ratio": 0.2}}],
    "Lora": LORA,
    "Lora + Checkpointing": [*LORA, *CHECKPOINTING],
    "Lora + FusedOps + Mesa, attention": [*LORA, *FUSED, *ATTENTION],
    "Lora + Reversible": [*LORA, {"Reversible": {}}],
    "Lora + FusedOps + Reversible": [*LORA, *FUSED, {"Reversible": {}}],
    "LadderSide": [{"LadderSide": {}}],
}
"""One of each kind, for any language model."""
