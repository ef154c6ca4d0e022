"""A plan as one self-contained HTML page: the table, the step's memory over time, where the bytes are."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from tightfit.core.artifacts import write_text
from tightfit.core.plan import CATEGORIES, Plan, mib
from tightfit.train.card import STYLE
from tightfit.train.stacked import columns, stacked_plot

if TYPE_CHECKING:
    from tightfit.core.verify import Verification

SHOWN_MODULES = 12


def plan_page(plan: Plan, verification: Verification | None = None) -> str:
    """The page as text; opens from disk, needs no network and no script."""
    head = f"{escape(str(plan.recipe))} on {escape(plan.model)}"
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Plan: {head}</title><style>{STYLE}</style></head><body>",
        f"<h1>{head}</h1><p>batch {escape(plan.batch)}, optimizer {escape(plan.optimizer)}</p>",
    ]
    if plan.conflicts:
        parts += ["<h2>Cannot be applied</h2><ul>", *(f"<li>{escape(str(c))}</li>" for c in plan.conflicts), "</ul>"]
        return "\n".join([*parts, "</body></html>\n"])
    parts += ["<h2>One training step</h2>", _figures(plan, verification)]
    if plan.simulation is not None:
        measured = verification.levels if verification is not None else None
        parts += [
            "<h2>Live bytes over the step</h2>",
            f"<figure>{stacked_plot(columns(plan.simulation.timeline), measured)}",
            f"<figcaption>{_where(plan)}</figcaption></figure>",
            "<h2>What is kept for the backward pass</h2>",
            _modules(plan),
        ]
    parts += ["<h2>What the recipe changes</h2>", _edits(plan)]
    if plan.notes:
        parts += ["<h2>Notes</h2><ul>", *(f"<li>{escape(note)}</li>" for note in plan.notes), "</ul>"]
    return "\n".join([*parts, "</body></html>\n"])


def write_plan_page(plan: Plan, path: Path, verification: Verification | None = None) -> None:
    """Write `plan_page` to a file, atomically."""
    write_text(path, plan_page(plan, verification))


def _figures(plan: Plan, verification: Verification | None) -> str:
    head = "<tr><th></th><th class=number>predicted</th>" + ("<th class=number>measured</th>" if verification else "")
    rows = [f"{head}</tr>"]
    values: list[tuple[str, int, int | None]] = [("measured peak" if plan.measured else "peak", plan.peak_bytes, None)]
    if verification is not None:
        values = list(verification.rows())
    elif plan.simulation is not None:
        values.append(("saved for backward", plan.simulation.saved_bytes, None))
    values += [(name, plan.by_category[name], None) for name in CATEGORIES if plan.by_category.get(name)]
    for name, value, measured in values:
        cell = f"<td class=number>{mib(measured) if measured is not None else ''}</td>" if verification else ""
        rows.append(f"<tr><td>{name}</td><td class=number>{mib(value)}</td>{cell}</tr>")
    share = 100 * plan.trainable_parameters / max(1, plan.total_parameters)
    count = f"<td class=number>{plan.trainable_parameters:,} ({share:.1f} %)</td>{'<td></td>' if verification else ''}"
    rows.append(f"<tr><td>trainable parameters</td>{count}</tr>")
    return f'<div class="wide"><table>{"".join(rows)}</table></div>'


def _where(plan: Plan) -> str:
    found = plan.simulation
    place = f"in {escape(found.peak_module)}" if found.peak_module else "outside the modules"
    return f"The peak is in the {escape(found.peak_phase.replace('_', ' '))} phase, {place}."


def _modules(plan: Plan) -> str:
    kept = sorted(plan.simulation.saved_by_module.items(), key=lambda item: -item[1])
    rows = [
        f"<tr><td>{escape(name or '(model)')}</td><td class=number>{mib(count)}</td></tr>"
        for name, count in kept[:SHOWN_MODULES]
    ]
    if len(kept) > SHOWN_MODULES:
        rest = sum(count for _, count in kept[SHOWN_MODULES:])
        rows.append(f"<tr><td>{len(kept) - SHOWN_MODULES} more</td><td class=number>{mib(rest)}</td></tr>")
    return f'<div class="wide"><table>{"".join(rows)}</table></div>'


def _edits(plan: Plan) -> str:
    counts: dict[tuple[str, str, str], int] = {}
    for row in plan.edits:
        key = (row.method, row.slot, row.note)
        counts[key] = counts.get(key, 0) + 1
    rows = [
        f"<tr><td>{escape(method)}</td><td>{escape(slot)}</td><td class=number>{count}</td><td>{escape(note)}</td></tr>"
        for (method, slot, note), count in counts.items()
    ]
    if not rows:
        return "<p>Nothing: this is the stock step.</p>"
    head = "<tr><th>method</th><th>slot</th><th class=number>edits</th><th></th></tr>"
    return f'<div class="wide"><table>{head}{"".join(rows)}</table></div>'
