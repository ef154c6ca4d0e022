"""Run benchmark scenarios: `python benchmarks/run.py [NAME ...]`; without names, the quick ones.

Each scenario is a module in benchmarks/scenarios with NAME, QUICK and run(); it writes its result file as it goes.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "scenarios")]


def main(wanted: list[str]) -> int:
    """Run the wanted scenarios one after another; 2 when a name is unknown."""
    found = {m.name: importlib.import_module(m.name) for m in pkgutil.iter_modules([str(HERE / "scenarios")])}
    unknown = [name for name in wanted if name not in found]
    if unknown:
        print(f"unknown scenario {', '.join(unknown)}; known are {', '.join(sorted(found))}", file=sys.stderr)
        return 2
    for name in wanted or sorted(name for name, module in found.items() if module.QUICK):
        start = time.perf_counter()
        found[name].run()
        print(f"{name}: {time.perf_counter() - start:.0f} s, benchmarks/results/{found[name].NAME}.json", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
