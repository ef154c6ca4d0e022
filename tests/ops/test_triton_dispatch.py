# ruff: noqa: F401, F811 (fixtures are imported)
"""When a Triton kernel takes over: which tensors, under which modes."""

import sys

import pytest
import torch
from kernel_devices import each_device, kernels_on, values
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from tightfit.ops import kernels
from tightfit.ops.affine import Affine


@each_device
def test_what_a_kernel_takes(device, kernels_on):
    x = values(2, 4, device=device)
    assert kernels.use(x) and kernels.use(None, x, torch.nn.Parameter(x)) and kernels.use(x.requires_grad_())
    assert kernels.use(x, dtypes=kernels.HALVES) and not kernels.use(x.double(), dtypes=kernels.HALVES)
    assert not kernels.use(x, torch.empty(0, 4, device=device))
    assert not kernels.use(x, torch.empty(2, 4, device="meta"))
    assert not kernels.use(x, x.as_subclass(type("Sub", (torch.Tensor,), {})))
    kernels_on(False)
    assert not kernels.use(x)


@each_device
def test_nothing_that_watches_operators_is_passed_by(device, kernels_on):
    x = values(2, 4, device=device)
    seen = []
    with FakeTensorMode() as mode:
        seen.append(kernels.use(x))
        seen.append(kernels.use(mode.from_tensor(x)))

    def watched(t):
        seen.append(kernels.use(x))
        seen.append(kernels.use(t))
        return t * 2

    torch.func.vmap(watched)(x)
    torch.func.grad(lambda t: watched(t).sum())(x)
    make_fx(watched)(x)
    make_fx(watched, tracing_mode="fake")(x)
    assert len(seen) == 10 and not any(seen) and kernels.use(x)


@each_device
def test_a_compiled_graph_does_what_plain_torch_does(device, kernels_on):
    seen = []

    @torch.compile(backend="aot_eager", fullgraph=True)
    def coded(x):
        if kernels.use(x):
            return x * 0
        codec = Affine(8)
        return codec.decode(codec.encode(x), x.shape, x.dtype)

    x = values(3, 128, device=device)
    kernels_on(False)
    codec = Affine(8)
    wanted = codec.decode(codec.encode(x), x.shape, x.dtype)
    kernels_on()
    seen.append(coded(x))
    torch.testing.assert_close(seen[0], wanted, rtol=0, atol=0.03)  # the CPU's own kernel may round ties apart


def test_the_switch_is_checked(monkeypatch):
    monkeypatch.setenv("TIGHTFIT_TRITON", "yes")
    with pytest.raises(ValueError, match="TIGHTFIT_TRITON: got 'yes', accepted is '0', '1' or 'interpret'"):
        kernels.use(torch.ones(1))


@pytest.mark.parametrize("chosen", ["0", None])
def test_the_interpreter_must_be_chosen_in_time(chosen, monkeypatch):
    if chosen is None:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    else:
        monkeypatch.setenv("TRITON_INTERPRET", chosen)
    with pytest.raises(RuntimeError, match="TIGHTFIT_TRITON=interpret needs TRITON_INTERPRET=1 too"):
        kernels._works.__wrapped__(torch.device("cpu"))


def test_cpu_tensors_need_the_switch(monkeypatch):
    monkeypatch.delenv("TIGHTFIT_TRITON", raising=False)
    assert not kernels.use(torch.ones(1))


def test_without_triton_there_are_no_kernels(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "tightfit.ops.affine.triton", None)
    monkeypatch.delattr("tightfit.ops.affine.triton", raising=False)
    assert not kernels._works.__wrapped__(torch.device("cpu"))
