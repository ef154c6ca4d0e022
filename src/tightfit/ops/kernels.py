"""Where Triton kernels stand in for the arithmetic of operators, and how they are launched.

An operator's `torch.py` asks `use` at the place where the arithmetic is and otherwise goes on in plain torch. What
is kept for backward is the same either way, so a plan, which runs on fake tensors, holds for both. The environment
variable TIGHTFIT_TRITON decides: "1" (as if unset) for kernels on GPUs, "0" for none, "interpret" for kernels on CPU
tensors too, by Triton's interpreter, which needs TRITON_INTERPRET=1 as well: slow, for tests.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from typing import Any

import torch
from torch import Tensor, nn

SWITCH = "TIGHTFIT_TRITON"
HALVES = (torch.float32, torch.bfloat16, torch.float16)
"""What kernels that compute in float32 take."""

_MODES = torch._C._TorchDispatchModeKey
_TRACERS = (_MODES.FAKE, _MODES.PROXY, _MODES.FUNCTIONAL)


def use(*tensors: Tensor | None, dtypes: tuple[torch.dtype, ...] | None = None) -> bool:
    """Whether a Triton kernel takes these tensors now; plain torch is always a correct answer to no.

    No for CPU tensors (but see TIGHTFIT_TRITON), subclasses such as fake tensors and DTensors, empty tensors, under
    `torch.func` transforms, while a graph is traced (there torch's operators are what a compiler fuses), and where
    Triton is absent or cannot run a kernel on this device.

    Args:
        tensors: all that the kernel would read or write; None is passed over.
        dtypes: types that the kernel takes, if not all.

    Raises:
        ValueError: TIGHTFIT_TRITON has another value.
        RuntimeError: it is "interpret" while TRITON_INTERPRET is not 1.

    Example:
        >>> use(torch.ones(2))
        False
    """
    switch = os.environ.get(SWITCH, "1")
    if switch == "0":
        return False
    if switch not in ("1", "interpret"):
        raise ValueError(f"environment variable {SWITCH}: got {switch!r}, accepted is '0', '1' or 'interpret'")
    on_cpu = switch == "interpret"
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in (Tensor, nn.Parameter) or not (tensor.is_cuda or (on_cpu and tensor.is_cpu)):
            return False
        if not tensor.numel() or (dtypes is not None and tensor.dtype not in dtypes):
            return False
    return not _traced() and _works(next(t.device for t in tensors if t is not None))


def _traced() -> bool:
    """Whether something looks at the operators that run: a kernel's launch would escape it."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return any(torch._C._get_dispatch_mode(key) is not None for key in _TRACERS)


@functools.cache
def _works(device: torch.device) -> bool:
    """Whether a kernel runs on this device: Triton needs a C compiler and a driver that it knows."""
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(f"{SWITCH}=interpret needs TRITON_INTERPRET=1 too, set before Triton is imported")
    try:
        from tightfit.ops.affine import triton as affine
    except ImportError:
        return False
    try:
        affine.pack(torch.zeros(1, 2, device=device), 2, 2, 8)
    except Exception as error:
        if device.type == "cpu":
            raise
        warnings.warn(
            f"no Triton kernels on {device}, plain torch instead ({SWITCH}=0 silences this): {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def launch(kernel: Any, grid: tuple[int, ...], like: Tensor, *arguments: Any, **constants: Any) -> None:
    """Run a kernel on the device of `like`; products and sums are rounded one by one, as torch's operators do."""
    where = torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext()
    with where:
        kernel[grid](*arguments, **constants, enable_fp_fusion=False)


def programs(like: Tensor) -> int:
    """How many programs fill the device of `like`; the same on every run there, so that sums are too."""
    return 4 * torch.cuda.get_device_properties(like.device).multi_processor_count if like.is_cuda else 4


def power_of_two(count: int) -> int:
    """The least power of two that holds `count`.

    >>> power_of_two(1), power_of_two(100), power_of_two(128)
    (1, 128, 128)
    """
    return 1 << (count - 1).bit_length()
