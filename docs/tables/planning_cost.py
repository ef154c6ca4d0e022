from __future__ import annotations

import statistics
from typing import Any

from tables import footer, grid


def table(result: dict[str, Any]) -> str:
    whole = [row for row in result["rows"] if "process_seconds" in row]
    step = [row for row in result["rows"] if "ratio" in row]
    first = [[r["name"], f"{statistics.median(r['process_seconds']):.1f}", f"{r['rss_mib']:,.0f}"] for r in whole]
    second = [
        [r["name"], f"{r['fake_seconds']:.2f}", f"{r['simulated_seconds']:.2f}", f"{r['ratio']:.2f}"] for r in step
    ]
    text = grid(["plan, in a fresh process", "seconds, imports included", "resident memory, MiB"], first)
    header = ["one step", "under FakeTensorMode alone, CPU s", "simulated, CPU s", "ratio"]
    return text + "\n\n" + grid(header, second) + "\n" + footer(result)
