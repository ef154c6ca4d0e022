"""Checks by trial that a module computes what its fused form assumes; nothing is decided by a model's name."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

TOLERANCE = 1e-4


def rms_offset(module: nn.Module, eps: float) -> float | None:
    """0 or 1 where the module is `(offset + weight) * x / sqrt(mean(x^2) + eps)`, None where it is something else."""
    twin = _alone(module)
    width = int(module.weight.shape[0])  # type: ignore[index, union-attr, arg-type]
    weight, x = torch.linspace(-1.0, 1.0, width), torch.linspace(-2.0, 3.0, 3 * width).view(3, width)
    twin._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    found = _call(twin, x)
    unit = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return next((o for o in (0.0, 1.0) if found is not None and _alike(found, (o + weight) * unit)), None)


def is_gated(module: nn.Module, names: tuple[str, str, str, str], dropout: str | None = None) -> bool:
    """Whether the module is, in training, `down(dropout(act(gate(x)) * up(x)))`, tried with small layers for its own.

    Tried with values up to hundreds, which no clamp leaves alone, and in bfloat16, where a cast shows. An activation
    that writes into its input is another form: the input is what is kept.

    Args:
        names: of gate, up, down and act.
        dropout: name of its dropout module; None: there is none.
    """
    gate, up, down, act = names
    generator = torch.Generator().manual_seed(0)
    twin = _alone(module, training=True)
    if dropout is not None:
        twin._modules[dropout] = _AddOne()
    for name, (inner, outer) in {gate: (4, 6), up: (4, 6), down: (6, 4)}.items():
        layer = nn.Linear(inner, outer, bias=False, device="meta")  # draws no random numbers
        layer.weight = nn.Parameter(torch.randn(outer, inner, generator=generator), requires_grad=False)
        twin._modules[name] = layer
    x = torch.randn(3, 4, generator=generator)
    function: Callable[[Tensor], Tensor] = getattr(twin, act)

    def same(dtype: torch.dtype) -> bool:
        layers = [twin._modules[name].to(dtype) for name in (gate, up, down)]  # type: ignore[union-attr]
        rows = torch.cat([x, 100 * x]).to(dtype)
        with torch.random.fork_rng(devices=[]):  # one that draws is refused; the numbers are the caller's
            found = _call(twin, rows)
        with torch.no_grad():
            opened = layers[0](rows)
            kept = opened.clone()
            product = function(opened) * layers[1](rows)
            expected = layers[2](product if dropout is None else product + 1)
        alike = found is not None and found.dtype == expected.dtype and torch.equal(found, expected)
        return alike and torch.equal(opened, kept)

    return same(torch.float32) and same(torch.bfloat16)


def is_pointwise(module: nn.Module) -> bool:
    """Whether the module maps every element by itself, keeps the shape, and leaves its input as it is."""
    x = torch.linspace(-3.0, 3.0, 12)
    given = x.clone()
    whole, apart = _call(module, given.view(3, 4)), _call(module, x.clone())
    if whole is None or apart is None or not torch.equal(given, x):
        return False
    return whole.shape == (3, 4) and torch.equal(whole.view(-1), apart)


class _AddOne(nn.Module):
    """Stands for a dropout: tells where it is called."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1


def _alone(module: nn.Module, training: bool = False) -> nn.Module:
    """A copy around the same tensors, with its own children."""
    twin = copy.copy(module)
    for table in ("_parameters", "_modules", "_buffers"):
        twin.__dict__[table] = dict(twin.__dict__[table])
    for name, child in twin._modules.items():
        twin._modules[name] = None if child is None else _alone(child, training)
    twin.__dict__["training"] = training
    return twin


def _call(module: nn.Module, x: Tensor) -> Tensor | None:
    # whatever a foreign forward raises here, it is not the form looked for
    try:
        with torch.no_grad():
            found = type(module).forward(module, x)
    except Exception:
        return None
    return found if isinstance(found, Tensor) else None


def _alike(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and torch.allclose(found.float(), expected, rtol=TOLERANCE, atol=TOLERANCE)
