"""Shared fixtures: one thread, fixed seeds, no network."""

import json
import os
import signal
import subprocess
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random state."""
    torch.manual_seed(0)


def pytest_configure(config):
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job; some tests are about Ctrl-C
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_sessionfinish(session, exitstatus):
    """Note the outcome of a whole run, so that a benchmark's result file can say whether the tests were green."""
    if hasattr(session.config, "workerinput") or len(session.config.args) != 1 or session.testscollected == 0:
        return
    root = session.config.rootpath
    if Path(session.config.args[0]).resolve() != root / "tests":
        return
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
    status = {"green": exitstatus == 0, "commit": commit.stdout.strip(), "selected": session.config.option.markexpr}
    (root / ".tests-status.json").write_text(json.dumps(status))
