from __future__ import annotations

import statistics
from typing import Any

from tables import footer, grid, mib


def table(result: dict[str, Any]) -> str:
    rows = [row for row in result["rows"] if "error" in row]
    kinds = {
        "peak": [r["error"] for r in rows],
        "part above the static bytes": [r["step_error"] for r in rows],
        "highest level of each phase": [error for r in rows for error in phase_errors(r).values()],
    }
    cells = []
    for title, errors in kinds.items():
        size = sorted(abs(100 * e) for e in errors)
        p95 = size[round(0.95 * (len(size) - 1))]
        under = -100 * min(0, *errors)
        cells.append([title, str(len(size)), *(f"{x:.4f}" for x in (statistics.median(size), p95, size[-1], under))])
    clear = [r for r in rows if clear_peak(r["measured_phases"])]
    right = sum(r["peak_phase"] == max(r["measured_phases"], key=r["measured_phases"].get) for r in clear)
    text = grid(["relative error, %", "figures", "median", "95th percentile", "worst", "most under"], cells)
    failed = [r["name"] for r in result["rows"] if "failure" in r]
    note = f"\n\nPhase of the peak: right in {right} of {len(clear)} rows where one phase leads by over 0.1 %."
    return text + note + (f" Not simulated: {', '.join(failed)}." if failed else "") + "\n" + footer(result)


def rows(result: dict[str, Any]) -> str:
    phases = ("forward", "backward", "clip", "optimizer", "zero_grad")
    rows = []
    for row in (r for r in result["rows"] if "error" in r):
        found = phase_errors(row)
        cells = [f"{100 * row['error']:+.4f}", f"{100 * row['step_error']:+.4f}", row["peak_phase"]]
        cells += [f"{100 * found[p]:+.4f}" if p in found else "" for p in phases]
        rows.append([row["name"], mib(row["predicted"]), mib(row["measured"]), *cells])
    header = ["configuration", "predicted, MiB", "measured, MiB", "error, %", "above static, %", "phase of the peak"]
    return grid([*header, *(f"{p.replace('_', ' ')}, %" for p in phases)], rows) + "\n" + footer(result)


def phase_errors(row: dict[str, Any]) -> dict[str, float]:
    """Signed relative error of the highest level of each phase."""
    return {p: row["predicted_phases"][p] / level - 1 for p, level in row["measured_phases"].items()}


def clear_peak(phases: dict[str, int]) -> bool:
    """Whether the highest phase is more than 0.1 % above the next."""
    first, second = sorted(phases.values())[-1:-3:-1]
    return first > second * 1.001
