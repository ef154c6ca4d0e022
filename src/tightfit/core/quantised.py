"""Quantised linear layers of other libraries (bitsandbytes, torchao): the bytes they take, and how a step is planned.

They hold packed weights in tensors of their own kinds, which take no part in a simulation. A planner's copy has a plain
linear layer in their place that allocates what they allocate: the packed bytes throughout, the weight in full while the
layer runs, forwards and backwards, or from one to the other where the library lets autograd keep it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tightfit.core import hfmodel
from tightfit.core.edit import Handle
from tightfit.core.errors import shorten

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


def only_unpacked(model: nn.Module) -> str | None:
    """What to tell who trains a quantised base with nothing added to it: only what is not packed would train.

    None where that was chosen: the model has adapters, a linear layer of a block trains, or part of what is not packed
    is frozen.
    """
    packed = {id(m._parameters["weight"]) for m in model.modules() if is_quantised(m) or isinstance(m, _PlannedLinear)}
    if not packed or hfmodel.adapter_parameters(model):
        return None
    unpacked = [(n, p) for n, p in model.named_parameters() if id(p) not in packed and p.is_floating_point()]
    linears = {f"{name}.weight" for name in hfmodel.block_linears(model)}
    if any(not p.requires_grad or name in linears for name, p in unpacked):
        return None
    names = shorten((name for name, _ in unpacked), 4)
    return (
        f"the {len(packed)} packed weights of this quantised {type(model).__name__} do not train and the recipe adds "
        f"nothing that does, so only {len(unpacked)} parameters beside them would: {names}; add tightfit.Lora, "
        f"LadderSide or SparseAdapter to the recipe, or freeze those of them that are not to train (requires_grad_)"
    )


def packed_for_inference(model: nn.Module) -> list[str]:
    """Layers of bitsandbytes that were packed anew for inference on the CPU, which no gradient passes."""
    states = (
        (n, vars(m._parameters["weight"]).get("quant_state")) for n, m in model.named_modules() if is_quantised(m)
    )
    return [name for name, state in states if getattr(state, "packing_format_for_cpu", False)]


class TrainableInEvaluation(Handle):
    """Keeps bitsandbytes' 4-bit layers from being packed anew for inference while a recipe is on the model.

    On CPUs with AVX512-BF16 a layer does so in its first call in evaluation mode, and stays that way: from then on its
    input gets a gradient of zero, and its scales are rounded to bfloat16.
    """

    _SWITCH = "support_avx512bf16_for_cpu"

    def __init__(self, model: nn.Module):
        self.layers = [module for module in model.modules() if getattr(module, self._SWITCH, False)]
        self._set(False)

    def undo(self, model: nn.Module) -> None:
        self._set(True)

    def _set(self, value: bool) -> None:
        for layer in self.layers:
            setattr(layer, self._SWITCH, value)


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
    kind = _PLANNED.get(type(weight).__name__, _PlannedTorchao)
    module.__class__ = type(type(stock).__name__, (kind,), {"__module__": type(stock).__module__})
    module.register_buffer("packed", torch.empty(room, dtype=torch.uint8, device="meta"), persistent=False)


def state_bytes(model: nn.Module) -> int:
    """Bytes of the scales and tables that quantised layers keep beside their parameters and buffers."""
    layers = [module for module in model.modules() if is_quantised(module)]
    return sum(layer_bytes(layer) - sum(t.nbytes for t in _held(layer.weight)) for layer in layers)


def _held(weight: Any) -> list[torch.Tensor]:
    return packed_parts(weight) or [weight]


def planned_bytes(model: nn.Module) -> int:
    """Bytes of a planner's copy's parameters, packed ones as they are."""
    found = sum(p.nbytes for p in model.parameters())
    for module in model.modules():
        if isinstance(module, _PlannedLinear):
            found += module.packed.nbytes - (module.weight.nbytes if module.weight.is_floating_point() else 0)
    return found


class _PlannedLinear(nn.Linear):
    """A layer of bitsandbytes: unpacks its weight forwards and again backwards."""

    packed: torch.Tensor
    keeps_input = False

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        outcome: Any = _Dequantising.apply(input, self.weight, self.bias, self.out_features, self.keeps_input)
        return outcome


class _Planned8bit(_PlannedLinear):
    """bitsandbytes' 8-bit layer holds its input where no checkpoint can drop it."""

    keeps_input = True


class _PlannedTorchao(_PlannedLinear):
    """A layer of torchao: autograd sees the unpacked weight and keeps it for backward."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        dense = torch.empty(self.out_features, self.in_features, device=input.device) * 1.0
        return F.linear(input, dense.to(input.dtype), None if self.bias is None else self.bias.to(input.dtype))


class _PlannedInt8Torchao(_PlannedLinear):
    """The same for int8 with a scale for each row, which scales the product."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        dense = torch.empty(self.in_features, self.out_features, dtype=input.dtype, device=input.device)
        rows = 1 if input.dtype == torch.float32 else self.out_features  # in float32 the packed ones serve
        scale = torch.empty(rows, dtype=input.dtype, device=input.device)
        out = torch.mm(input.reshape(-1, self.in_features), dense) * scale
        out = out.reshape(*input.shape[:-1], self.out_features)
        return out if self.bias is None else out.add_(self.bias)


_PLANNED = {"Params4bit": _PlannedLinear, "Int8Params": _Planned8bit, "Int8Tensor": _PlannedInt8Torchao}


class _Dequantising(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, packed, bias, height, keeps_input):
        dense = torch.empty(height, x.shape[-1], dtype=x.dtype, device=x.device)
        ctx.save_for_backward(packed)
        ctx.height, ctx.width, ctx.biased = height, x.shape[-1], bias is not None
        ctx.kept = x if keeps_input else None
        return F.linear(x, dense, bias if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        dense = torch.empty(ctx.height, ctx.width, dtype=grad.dtype, device=grad.device)
        bias = grad.reshape(-1, ctx.height).sum(0) if ctx.biased and ctx.needs_input_grad[2] else None
        return grad @ dense if ctx.needs_input_grad[0] else None, None, bias, None, None
