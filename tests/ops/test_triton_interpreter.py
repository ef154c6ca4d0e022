"""The tests of Triton kernels, in a process in which Triton interprets them on CPU tensors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
APART = (Path(__file__).name, "test_triton_builds.py")  # the latter needs the compiler
FILES = sorted(str(path) for path in HERE.glob("test_triton_*.py") if path.name not in APART)


@pytest.mark.parametrize("chosen", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_all_kernels_in_the_interpreter(chosen):
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    only = ["-m", f"{chosen} and not gpu"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *only, *FILES]
    done = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
