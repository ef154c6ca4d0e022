"""Operators on a GPU with their Triton kernels and in plain torch: time, temporary memory, and how far apart they are.

Sizes are those of a layer of Llama 3 8B at 4,096 tokens (the head's loss: 2,048). Each call is timed by Triton's own
bench with a cold cache, kernels and plain torch in turns; temporary bytes are the allocator's rise above what was there
before the call, results included. A call whose results differ by more than its bound is not timed.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any

import record

NAME = "kernel_time"
QUICK = False
TOKENS, HEAD_TOKENS = 4096, 2048
WIDTH, INNER, VOCABULARY = 4096, 14336, 128256
DTYPES = ("bfloat16", "float32")
ROUNDS = 5
BOUND = {"bfloat16": 2e-2, "float32": 1e-4}
"""Of the relative difference of the results; codes and their decoded values must be equal."""

Call = Callable[[], Any]


def cases(dtype: Any) -> Iterator[tuple[str, Call]]:
    """Calls without arguments, each with its name; a backward is timed by itself."""
    import torch
    from torch import nn

    from tightfit.ops.activation import few_bit_activation, gated_activation, slope_of
    from tightfit.ops.affine import Affine
    from tightfit.ops.dropout import dropout
    from tightfit.ops.linear_cross_entropy import linear_cross_entropy
    from tightfit.ops.norm import layer_norm, rms_norm
    from tightfit.ops.source import source_of

    def numbers(*shape: int, grad: bool = False) -> Any:
        return torch.randn(*shape, device="cuda", dtype=dtype).requires_grad_(grad)

    def backward(out: Any, *inputs: Any) -> Call:
        pull = torch.randn_like(out)
        return lambda: torch.autograd.grad(out, inputs, pull, retain_graph=True)

    for bits in (8, 4):
        codec, x = Affine(bits), numbers(TOKENS, WIDTH)
        packed = codec.encode(x)
        yield f"encode, {bits} bits", lambda codec=codec, x=x: codec.encode(x)
        yield (
            f"decode, {bits} bits",
            lambda codec=codec, x=x, packed=packed: codec.decode(packed, x.shape, x.dtype),
        )

    weight, bias = numbers(WIDTH, grad=True), numbers(WIDTH, grad=True)
    x = numbers(TOKENS, WIDTH, grad=True)
    for name, codec in (("", None), (", 8 bits", Affine(8))):
        out = rms_norm(x, weight, 1e-6, lambda t: nn.functional.rms_norm(t, (WIDTH,), weight, 1e-6), codec=codec)
        yield f"RMSNorm backward{name}", backward(out, x, weight)
        out = layer_norm(x, (WIDTH,), weight, bias, 1e-5, codec=codec)
        yield f"LayerNorm backward{name}", backward(out, x, weight, bias)

    gate, up = numbers(TOKENS, INNER, grad=True), numbers(TOKENS, INNER, grad=True)
    for name, function in (("SwiGLU", nn.SiLU()), ("GeGLU", nn.GELU(approximate="tanh"))):
        out = gated_activation(gate, up, function, slope_of(function))
        source = source_of(out)
        yield f"{name} backward", backward(out, gate, up)
        if source is not None:
            yield f"{name} rebuilt", lambda source=source: source.rebuild.make(source.kept, None)
    yield "SiLU with 2-bit derivative", lambda gate=gate: few_bit_activation(gate, nn.SiLU(), "silu")
    yield "SiLU with 2-bit derivative, backward", backward(few_bit_activation(gate, nn.SiLU(), "silu"), gate)
    yield "dropout backward", backward(dropout(x, 0.1), x)

    del gate, up, out, source
    hidden, head = numbers(HEAD_TOKENS, WIDTH, grad=True), numbers(VOCABULARY, WIDTH, grad=True)
    with torch.no_grad():
        head.mul_(WIDTH**-0.5)
    target = torch.randint(VOCABULARY, (HEAD_TOKENS,), device="cuda")
    for tokens in (None, 512):
        yield (
            f"head and loss, {'default' if tokens is None else tokens} tokens a block",
            lambda tokens=tokens: torch.autograd.grad(
                linear_cross_entropy(hidden, head, target, chunk_tokens=tokens), (hidden, head)
            ),
        )


def tensors(found: Any) -> list[Any]:
    """The tensors of a result."""
    return [t for t in (found if isinstance(found, (tuple, list)) else (found,)) if t is not None]


def difference(ours: Any, theirs: Any) -> float:
    """Largest relative difference of two results' tensors, by norm; of bytes the share that differs."""
    import torch

    found = []
    for one, other in zip(tensors(ours), tensors(theirs), strict=True):
        if one.dtype == torch.uint8:
            found.append(float((one != other).float().mean()))
        else:
            found.append(float((one.float() - other.float()).norm() / other.float().norm()))
    return max(found)


def temporary_bytes(call: Call) -> int:
    """The allocator's rise during a call."""
    import torch

    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def row(name: str, dtype: str, call: Call) -> dict[str, Any]:
    """One call with kernels and without."""
    import torch
    from triton.testing import do_bench

    milliseconds: dict[str, list[float]] = {"torch": [], "triton": []}
    results, temporary = {}, {}
    for kind in milliseconds:
        os.environ["TIGHTFIT_TRITON"] = "1" if kind == "triton" else "0"
        torch.manual_seed(0)
        results[kind] = call()  # compiles
        temporary[kind] = temporary_bytes(call)
    apart = difference(results["triton"], results["torch"])
    bound = 0.0 if "code" in name else BOUND[dtype]
    del results
    found = {"operator": name, "dtype": dtype, "difference": apart, "bound": bound, "temporary_bytes": temporary}
    if not apart <= bound:
        return found
    for turn in range(ROUNDS):
        for kind in ("torch", "triton") if turn % 2 else ("triton", "torch"):
            os.environ["TIGHTFIT_TRITON"] = "1" if kind == "triton" else "0"
            milliseconds[kind].append(do_bench(call, return_mode="median"))
    median = {kind: statistics.median(times) for kind, times in milliseconds.items()}
    return {
        **found,
        "milliseconds": median,
        "range": {kind: [min(times), max(times)] for kind, times in milliseconds.items()},
        "speedup": median["torch"] / median["triton"],
    }


def run() -> list[dict[str, Any]]:
    """One row per operator and dtype; nothing where there is no GPU."""
    import torch

    from tightfit.ops import kernels

    if not torch.cuda.is_available():
        print("kernel_time: skipped, it times GPU kernels and no CUDA device is visible", file=sys.stderr)
        return []
    before = os.environ.get(kernels.SWITCH)
    os.environ[kernels.SWITCH] = "1"
    if not kernels.use(torch.ones(1, device="cuda")):
        print("kernel_time: skipped, no Triton kernel runs on this device", file=sys.stderr)
        return []
    import triton

    rows: list[dict[str, Any]] = []
    try:
        for dtype in DTYPES:
            for name, call in cases(getattr(torch, dtype)):
                rows.append(row(name, dtype, call))
                print(rows[-1], flush=True)
    finally:
        os.environ.pop(kernels.SWITCH)
        if before is not None:
            os.environ[kernels.SWITCH] = before
    sizes = {"tokens": TOKENS, "head_tokens": HEAD_TOKENS, "width": WIDTH, "inner": INNER, "vocabulary": VOCABULARY}
    record.write(NAME, {**sizes, "rounds": ROUNDS, "triton": triton.__version__}, rows)
    return rows
