"""The demo's table and plot: `tightfit demo` as a user runs it, recorded for the README.

An output folder of an earlier run may be named in TIGHTFIT_DEMO_OUTPUT; it is recorded instead of running again.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import record

NAME = "demo"
QUICK = False


def run() -> list[dict[str, Any]]:
    """One row per recipe of the demo."""
    earlier = os.environ.get("TIGHTFIT_DEMO_OUTPUT")
    with tempfile.TemporaryDirectory() as folder:
        output = Path(earlier) if earlier else Path(folder) / "demo-output"
        config: dict[str, Any] = {}
        if not earlier:
            from tightfit.cli.demo import run_demo

            start = time.perf_counter()
            run_demo(output, quick=False)
            config["seconds"] = round(time.perf_counter() - start)
        found = json.loads((output / "comparison.json").read_text())
        for suffix in ("png", "svg"):
            shutil.copy(output / f"plot.{suffix}", record.ROOT / "docs" / "images" / f"demo.{suffix}")
    rows = found.pop("rows")
    record.write(NAME, {**found, **config}, rows)
    return rows
