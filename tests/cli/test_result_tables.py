"""The tables of measured results, and the recipes that stand in them."""

from __future__ import annotations

from pathlib import Path

import pytest

import tightfit
from tightfit.presets import named

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def folders(monkeypatch):
    for folder in ("docs", "benchmarks", "benchmarks/scenarios"):
        monkeypatch.syspath_prepend(str(ROOT / folder))


def test_named_recipes_are_those_of_the_frontier():
    import frontier
    from tables.frontier import PRESETS

    for name, recipe in PRESETS.items():
        assert tightfit.Recipe.from_list(frontier.RECIPES[recipe]) == named(name)


def _result(*rows):
    """A result file of one shape; rows are (recipe, peak, time)."""
    made = [
        {"shape": "s", "recipe": recipe, "peak_bytes": peak, "whole_peak_bytes": peak, "measured": time}
        for recipe, peak, time in rows
    ]
    versions = {"torch": "2", "transformers": "5"}
    about = {"date": "today", "device": "cpu", "threads": 1, "versions": versions, "commit": "abc"}
    return {"config": {"shapes": {"s": {}}, "baselines": ["stock", "LoRA"]}, "rows": made, **about}


def test_the_frontier_of_rows():
    from tables.frontier import frontier

    rows = _result(*(("r", *r) for r in [(10, 1.0), (8, 1.2), (9, 1.3), (4, 2.0), (12, 0.9), (12, 1.0)]))["rows"]
    found = [(row["peak_bytes"], row["measured"]) for row in frontier(rows)]
    assert found == [(4, 2.0), (8, 1.2), (10, 1.0), (12, 0.9)]


def test_what_stands_beside_the_baselines():
    from tables.frontier import claim

    told = claim(_result(("stock", 10, 1.0), ("LoRA", 8, 0.8), ("Mesa", 4, 0.9), ("TokenTune", 8, 0.4)))
    assert "| s | LoRA | TokenTune | 0.50 | TokenTune | 1.00 |" in told
    assert "| s | stock |" not in told  # LoRA is better in both
    assert "| s | LoRA | none |  | none |  |" in claim(_result(("LoRA", 8, 0.8), ("Mesa", 9, 0.9)))
