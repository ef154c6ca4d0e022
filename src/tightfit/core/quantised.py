"""Quantised linear layers of other libraries (bitsandbytes, torchao): the bytes they take, and how a step is planned.

They hold packed weights in tensors of their own kinds, which take no part in a simulation. A planner's copy has a plain
linear layer in their place that allocates what they allocate: the packed bytes throughout, the weight in full while the
layer runs, forwards and backwards.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_PACKED = ("Params4bit", "Int8Params")


def is_quantised(module: nn.Module) -> bool:
    """Whether a layer's weight is packed by bitsandbytes or torchao."""
    weight = module._parameters.get("weight")
    return weight is not None and (type(weight).__name__ in _PACKED or _is_torchao(weight))


def _is_torchao(tensor: torch.Tensor) -> bool:
    return is_traceable_wrapper_subclass(tensor) and type(tensor).__module__.startswith("torchao.")


def storage_bytes(tensor: torch.Tensor) -> int:
    """Bytes that a tensor really takes, with its scales where it is a packed one.

    >>> storage_bytes(torch.zeros(3, 4))
    48
    """
    parts = packed_parts(tensor)
    if parts is not None:
        return sum(map(storage_bytes, parts))
    return tensor.nbytes + _state_bytes(tensor)


def layer_bytes(module: nn.Module) -> int:
    """Bytes of a quantised layer's weight, with scales that bitsandbytes has moved to the layer in its first call."""
    weight: Any = module._parameters["weight"]
    scales: Any = getattr(vars(module).get("state"), "SCB", None)
    moved = scales is not None and vars(weight).get("SCB") is None
    return storage_bytes(weight) + (scales.nbytes if moved else 0)


def packed_parts(tensor: torch.Tensor) -> list[torch.Tensor] | None:
    """The plain tensors that a packed weight of torchao consists of; None of another tensor."""
    if not _is_torchao(tensor):
        return None
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    return [getattr(tensor, name) for name in names]


def _state_bytes(tensor: torch.Tensor) -> int:
    """Scales and tables of a weight packed by bitsandbytes."""
    scales: Any = vars(tensor).get("SCB")
    found = [scales] if scales is not None else []
    state = vars(tensor).get("quant_state")
    while state is not None:
        found += [value for value in (state.absmax, state.code, getattr(state, "offset", None)) if value is not None]
        state = getattr(state, "state2", None)
    return sum(value.nbytes for value in found)


def plan_as_plain(module: Any, stock: Any) -> None:
    """Make the copy of a quantised layer on the meta device one that a simulated step can run."""
    weight: Any = stock.weight
    width, height = module.in_features, module.out_features
    torchao = _is_torchao(weight)
    room = layer_bytes(stock) if torchao else layer_bytes(stock) - weight.nbytes
    if torchao:  # in shape and dtype as before; what it takes stands in the buffer
        dense = torch.empty(1, dtype=weight.dtype, device="meta").expand(height, width)
        module._parameters["weight"] = nn.Parameter(dense, requires_grad=False)
    kept = {key: value for key, value in vars(module).items() if key in vars(nn.Linear(1, 1, device="meta"))}
    vars(module).clear()
    vars(module).update(kept, in_features=width, out_features=height)
    module.__class__ = type(type(stock).__name__, (_PlannedLinear,), {"__module__": type(stock).__module__})
    module.register_buffer("packed", torch.empty(room, dtype=torch.uint8, device="meta"), persistent=False)


def planned_bytes(model: nn.Module) -> int:
    """Bytes of a planner's copy's parameters, packed ones as they are."""
    found = sum(p.nbytes for p in model.parameters())
    for module in model.modules():
        if isinstance(module, _PlannedLinear):
            found += module.packed.nbytes - (module.weight.nbytes if module.weight.is_floating_point() else 0)
    return found


class _PlannedLinear(nn.Linear):
    packed: torch.Tensor

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _Dequantising.apply(input, self.weight, self.bias, self.out_features)  # type: ignore[return-value]


class _Dequantising(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, packed, bias, height):
        dense = torch.empty(height, x.shape[-1], dtype=x.dtype, device=x.device)
        ctx.save_for_backward(packed)
        ctx.height, ctx.width, ctx.biased = height, x.shape[-1], bias is not None
        return F.linear(x, dense, bias if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        dense = torch.empty(ctx.height, ctx.width, dtype=grad.dtype, device=grad.device)
        bias = grad.reshape(-1, ctx.height).sum(0) if ctx.biased and ctx.needs_input_grad[2] else None
        return grad @ dense if ctx.needs_input_grad[0] else None, None, bias, None
