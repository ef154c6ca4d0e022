"""What the tables of the docs are made of; a module per result file, a function per table (see generate.py)."""

from __future__ import annotations

import statistics
from typing import Any


def grid(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table.

    >>> print(grid(["a", "b"], [["1", "2"]]))
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


def spread(values: list[float]) -> str:
    """Mean and range over seeds."""
    mean = statistics.fmean(values)
    return f"{mean:.4f} ({min(values):.4f}-{max(values):.4f})" if len(values) > 1 else f"{mean:.4f}"


def by_model(result: dict[str, Any], key: str, digits: int) -> str:
    """A line per recipe, a column per model."""
    models = list(dict.fromkeys(row["model"] for row in result["rows"]))
    found = {(row["model"], row["recipe"]): row for row in result["rows"]}
    rows = []
    for recipe in dict.fromkeys(row["recipe"] for row in result["rows"]):
        cells = [found.get((model, recipe)) for model in models]
        rows.append([recipe, *("" if row is None else f"{row[key]:.{digits}f}" for row in cells)])
    return grid(["recipe", *models], rows) + "\n" + footer(result)


def step_times(result: dict[str, Any], *, told_by: str, columns: dict[str, str], ratio: str) -> str:
    """A line per row that was timed (it has the key `told_by`): its `columns`, and the ratio of two step times."""
    rows = [
        [*(row[key] for key in columns), f"{row['measured']:.2f} ({row['measured_least']:.2f})"]
        for row in result["rows"]
        if told_by in row
    ]
    return grid([*columns.values(), f"{ratio} (of the fastest steps)"], rows) + "\n" + footer(result)
