"""Every kernel, as the operators launch it, is built for a GPU by Triton's compiler, which needs no GPU for that.

The interpreter takes more than the compiler does, so this stands beside it. Nothing is run: results are whatever
memory held.
"""

import os

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from tightfit.ops import kernels
from tightfit.ops.activation import few_bit_activation, gated_activation, slope_of
from tightfit.ops.affine import Affine
from tightfit.ops.dropout import dropout
from tightfit.ops.linear_cross_entropy import linear_cross_entropy
from tightfit.ops.norm import layer_norm, rms_norm
from tightfit.ops.source import source_of

pytestmark = pytest.mark.slow
HOPPER = GPUTarget("cuda", 90, 32)
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.uint8: "u8", torch.int64: "i64"}


@pytest.fixture
def built(monkeypatch):
    """Names of the kernels that were built; launches build instead of run."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.fail("interpreted kernels cannot be built; run this in a process of its own")
    names = []

    def build(kernel, grid, like, *arguments, **constants):
        places = kernel.arg_names
        options = {name: value for name, value in constants.items() if name not in places}
        signature = dict.fromkeys(places, "constexpr")
        fixed = {(places.index(name),): value for name, value in constants.items() if name in places}
        for place, (name, value) in enumerate(zip(places, arguments)):
            if isinstance(value, torch.Tensor):
                signature[name] = "*" + NAMES[value.dtype]
            elif isinstance(value, float):
                signature[name] = "fp32"
            elif value == 1:  # as a launch would
                fixed[(place,)] = 1
            else:
                signature[name] = "i32"
        made = compile(
            ASTSource(kernel, signature, fixed), target=HOPPER, options={**options, "enable_fp_fusion": False}
        )
        assert made.asm["cubin"] and "fma.rn.f32" not in made.asm["ptx"]
        names.append(kernel.__name__)

    monkeypatch.setattr(kernels, "launch", build)
    monkeypatch.setattr(kernels, "use", lambda *tensors, dtypes=None: True)
    return names


def leaf(*shape):
    return torch.zeros(*shape, dtype=torch.bfloat16, requires_grad=True)


@pytest.mark.parametrize("bits", [8, 4])
def test_affine(bits, built):
    for width, rounding in ((200, "nearest"), (1009, "stochastic"), (1, "nearest")):
        codec, x = Affine(bits, rounding=rounding), leaf(3, width).detach()
        codec.decode(codec.encode(x), x.shape, x.dtype)
    assert built == ["_pack", "_unpack"] * 3


def test_norms(built):
    for width, codec in ((200, None), (200, Affine(8)), (1, None), (4096, None)):
        x, weight, bias = leaf(4, width), leaf(width), leaf(width)
        layer_norm(x, (width,), weight, bias, 1e-5, codec=codec).sum().backward()
        rms_norm(x, weight, 1e-6, lambda t, w=weight: t * w.detach(), codec=codec).sum().backward()
    layer_norm(leaf(4, 200), (200,), None, None, 1e-5).sum().backward()
    assert built.count("_backward") == 9


@pytest.mark.parametrize("function", [nn.SiLU(), nn.GELU(), nn.GELU(approximate="tanh")], ids=str)
def test_gated_activations(function, built):
    out = gated_activation(leaf(5, 9), leaf(5, 9), function, slope_of(function))
    source = source_of(out)
    source.rebuild.make(source.kept, None)
    out.sum().backward()
    assert built == ["_product", "_gated_backward"]


def test_bits(built):
    few_bit_activation(leaf(5, 9), nn.SiLU(), "silu").sum().backward()
    dropout(leaf(5, 9), 0.1).sum().backward()
    assert built == ["_step_codes", "_stepped", "_pack", "_times_noise"]


@pytest.mark.parametrize("how", [{}, {"softcap": 3.0, "label_smoothing": 0.1, "scale": 2.0}], ids=str)
@pytest.mark.parametrize("rows", [50, 9000])
def test_head_loss(rows, how, built):
    linear_cross_entropy(leaf(5, 9), leaf(rows, 9), torch.zeros(5, dtype=torch.long), **how).backward()
    assert built == ["_statistics", "_gradient"]
