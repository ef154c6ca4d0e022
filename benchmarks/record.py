"""Result files: what was run, on what, with which versions, at which commit, and whether the tests were green."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

from tightfit.core.artifacts import write_text

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SHARED = ROOT.parent / "shared"
PACKAGES = ("tightfit", "torch", "transformers", "peft", "accelerate", "datasets", "numpy")


def surroundings() -> dict[str, Any]:
    """Versions, device, commit and the state of the tests, for a result file."""
    import torch

    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu(),
        "threads": torch.get_num_threads(),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--", "src")),
        "tests": tests_status(),
    }


def tests_status() -> dict[str, Any]:
    """The outcome of the last whole test run, as tests/conftest.py recorded it."""
    path = ROOT / ".tests-status.json"
    return json.loads(path.read_text()) if path.exists() else {"green": None}


def write(name: str, config: dict[str, Any], rows: list[dict[str, Any]]) -> Path:
    """Write benchmarks/results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    write_text(path, json.dumps({"name": name, "config": config, **surroundings(), "rows": rows}, indent=1) + "\n")
    return path


def read(name: str) -> dict[str, Any] | None:
    """A result file, or None where it was not made yet."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def rows(name: str, config: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """The rows of a result file; none where there is no file, or where its config is not the given one."""
    earlier = read(name)
    wanted = earlier is not None and (config is None or earlier["config"] == json.loads(json.dumps(config)))
    return earlier["rows"] if earlier is not None and wanted else []


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()
