"""Where the tests of Triton kernels run: in a child under Triton's interpreter on CPU tensors, else on a GPU.

The interpreter must be chosen before anything imports Triton, so a process of its own runs those tests: see
test_triton_interpreter.py.
"""

import os

import pytest
import torch

from tightfit.ops import kernels

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
without_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=[pytest.mark.gpu, without_gpu])]
each_device = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture
def kernels_on(monkeypatch):
    """A switch: kernels_on(False) makes the operators go on in plain torch."""

    def switch(on=True):
        monkeypatch.setenv("TIGHTFIT_TRITON", ("interpret" if INTERPRETED else "1") if on else "0")

    switch()
    kernels.use(torch.ones(1, device="cpu" if INTERPRETED else "cuda"))  # which tries one, the first time
    return switch


@pytest.fixture
def counted(kernels_on, monkeypatch):
    """The names of the kernels that were launched."""
    seen, launch = [], kernels.launch

    def count(kernel, *arguments, **constants):
        seen.append(kernel.__name__)
        return launch(kernel, *arguments, **constants)

    monkeypatch.setattr(kernels, "launch", count)
    return seen


def values(*shape, dtype=torch.float32, device="cpu", seed=1):
    """Gaussian numbers, the same on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def assert_same(found, wanted):
    """Equal bit for bit, NaN where NaN is; the interpreter cuts float32 off to bfloat16 where a GPU rounds."""
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    cut = INTERPRETED and found.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted, rtol=2**-7 if cut else 0, atol=0, equal_nan=True)
