"""Every method under every integration: it trains, or one clear error says before training that it cannot.

What is found must be what docs/data/integrations.json says, of which the table in the docs is made. Anew:
`TIGHTFIT_WRITE_TABLES=1 pytest tests/integrations/test_integrations.py`, then `python docs/generate.py`.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
from pathlib import Path

import pytest
from checks.rows import ROWS
from integration_cases import METHODS, Outcome, Steps, applied_to, method_of, stock
from integration_runs import INTEGRATIONS, reset_accelerate

import tightfit

TABLE = Path(__file__).parents[2] / "docs" / "data" / "integrations.json"
WRITES = bool(os.environ.get("TIGHTFIT_WRITE_TABLES"))
LIBRARIES = ("torch", "transformers", "accelerate", "peft", "trl", "lightning")

# a random model puts much probability on dropped tokens, and a plain model is not the one that was trained
pytestmark = [
    pytest.mark.filterwarnings(r"ignore:PartialEmbedding\(head='pruned'\):UserWarning"),
    pytest.mark.filterwarnings(r"ignore:(merge|export)\(\). the weights were trained with a second:UserWarning"),
]


def recorded() -> dict[tuple[str, str], Outcome]:
    if not TABLE.exists():
        return {}
    rows = json.loads(TABLE.read_text(encoding="utf-8"))["rows"]
    return {(r["row"], r["integration"]): Outcome(r["verdict"], r["model"], r["reason"]) for r in rows}


RECORDED = recorded()


def diagonal() -> set[tuple[str, str]]:
    """The cells of the quick run: each method once, under the next integration that trains its models."""
    names, found = list(INTEGRATIONS), set()
    first = {method_of(row): row.name for row in reversed(METHODS)}
    for at, row in enumerate(sorted(first.values())):
        turn = [*names[at % len(names) :], *names[: at % len(names)]]
        found.add((row, next(n for n in turn if (row, n) not in RECORDED or RECORDED[row, n].verdict != "-")))
    return found


QUICK = diagonal()
CELLS = [
    pytest.param(
        row,
        name,
        id=f"{row.name}-{name.replace(' ', '-')}",
        marks=() if WRITES or (row.name, name) in QUICK else pytest.mark.slow,
    )
    for name in INTEGRATIONS
    for row in METHODS
]


@pytest.fixture(scope="module")
def outcomes():
    """What the tests have found; where that is asked for, the table's data are brought up to date with it."""
    found: dict[tuple[str, str], Outcome] = {}
    yield found
    if WRITES:
        methods, known = {row.name: method_of(row) for row in METHODS}, recorded() | found
        rows = [
            {"method": method, "row": row, "integration": name} | dataclasses.asdict(known[row, name])
            for row, method in methods.items()
            for name in INTEGRATIONS
            if (row, name) in known
        ]
        versions = {library: importlib.metadata.version(library).split("+")[0] for library in LIBRARIES}
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def outcome(row, name, folder) -> Outcome:
    """Run one method under one integration, on the first kind of model that the method works on by itself."""
    run, families = INTEGRATIONS[name]
    reasons = {}
    for family in families:
        try:
            applied_to(row, stock(family)).remove()
        except (tightfit.TightfitError, ValueError) as error:  # a field's value may not be for this model
            reasons[family] = str(error)
            continue
        with Steps() as steps:
            try:
                run(row, family, folder)
            except tightfit.TightfitError as error:
                assert not steps.count, f"refused after {steps.count} steps: {error}"
                return Outcome("no", family, str(error))
        assert steps.count
        return Outcome("yes", family)
    assert not set(families) & set(row.families)
    return Outcome("-", families[0], reasons[families[0]])


@pytest.mark.parametrize(("row", "name"), CELLS)
def test_a_method_under_an_integration(row, name, tmp_path, monkeypatch, outcomes):
    if name == "Lightning":
        pytest.importorskip("lightning")
    monkeypatch.chdir(tmp_path)
    reset_accelerate()
    outcomes[row.name, name] = found = outcome(row, name, tmp_path)
    if not WRITES:
        assert found == RECORDED[row.name, name], f"otherwise than {TABLE.name} says; see the top of this file"


@pytest.mark.skipif(WRITES, reason="the table is being written")
def test_the_table_is_complete():
    assert set(RECORDED) == {(row.name, name) for row in METHODS for name in INTEGRATIONS}
    assert {method_of(row) for row in METHODS} == {cls.__name__ for cls in tightfit.methods()}
    assert {name for _, name in QUICK} == set(INTEGRATIONS)
    assert {method_of(row) for row in ROWS if row.name in {row for row, _ in QUICK}} >= {
        method_of(row) for row in METHODS
    }
    for found in RECORDED.values():
        assert (found.reason is None) == (found.verdict == "yes")
