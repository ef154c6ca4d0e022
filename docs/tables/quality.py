from __future__ import annotations

import statistics
from typing import Any

from tables import footer, grid


def of_group(result: dict[str, Any], group: str) -> str:
    """A line per recipe: its metric on every task, in points, the mean over seeds; and how far it is from its base.

    That is the mean over tasks, of each the mean over the seeds that both were run with.
    """
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
    missing = [recipe for recipe in recipes if not any((recipe, task) in values for task in tasks)]
    for recipe in (recipe for recipe in recipes if recipe not in missing):
        base = "Lora" if recipe.startswith("Lora + ") else "stock"
        cells, differences = [], []
        for task in tasks:
            found, others = values.get((recipe, task), {}), values.get((base, task), {})
            cells.append(f"{statistics.fmean(found.values()):.1f}" if found else "-")
            both = found.keys() & others.keys()  # a run that is not there yet must not move the mean
            if both:
                differences.append(statistics.fmean(found[seed] - others[seed] for seed in both))
        mean = f"{statistics.fmean(differences):+.2f} to {base}" if differences and recipe != base else ""
        rows.append([recipe, *cells, mean])
    header = ["recipe", *(f"{task}, {metric}" for task, metric in tasks.items()), "mean difference"]
    count = "-".join(map(str, sorted({min(seeds), max(seeds)})))
    told = "of one seed, which says little" if max(seeds) == 1 else f"means over {count} seeds"
    left = f" Not run yet: {'; '.join(missing)}." if missing else ""
    return grid(header, rows) + f"\n\nIn points; {told}.{left}\n" + footer(result)


def activations(result: dict[str, Any]) -> str:
    return of_group(result, "activations")


def tokens(result: dict[str, Any]) -> str:
    return of_group(result, "tokens")


def reversible(result: dict[str, Any]) -> str:
    return of_group(result, "reversible")


def side(result: dict[str, Any]) -> str:
    return of_group(result, "side")
