"""The `calibrate` command: measure this machine for the planner's time model, and show what was found."""

from __future__ import annotations

import json

from rich.table import Table

from tightfit.cli.commands import quiet, say, show


def run_calibrate(again: bool, as_json: bool) -> None:
    quiet()
    from tightfit.core.calibrate import cache_path, calibrate
    from tightfit.core.timing import MEDIAN_ERROR, WORST_ERROR

    found = calibrate(force=again, progress=lambda part: say(f"measuring {part}"))
    path = cache_path()
    kept = path.exists()
    figures = found.headline()
    if as_json:
        facts = {"machine": found.machine, "path": str(path) if kept else None, "figures": figures}
        errors = {"median_error": MEDIAN_ERROR, "worst_error": WORST_ERROR}
        print(json.dumps({**facts, **errors}, indent=1))
        return
    table = Table("", f"{found.machine['device']}, {found.machine['threads']} threads")
    for name, value in figures.items():
        table.add_row(name, f"{value:,.1f}")
    show(table)
    print(found.note())
    print(f"kept in {path}" if kept else f"not kept: {path} cannot be written, so the next plan does not know it")
