"""Losses and gradients that are not finite: which layer they come from.

Nothing is looked at in a normal step. The step that went wrong is run again from its inputs and its random state, with
hooks on every module: the first output, in the order of the forward, or the first gradient of an output, in the order
of the backward, that is not finite.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Part:
    """One forward and backward of a step, so that it can be run again.

    Fields:
        inputs, items: what the Trainer's `training_step` was given.
        random: torch's random states before it, the CPU's first.
    """

    inputs: dict[str, Any]
    items: Any
    random: tuple[Tensor, ...]

    @classmethod
    def of(cls, inputs: dict[str, Any], items: Any, device: torch.device) -> Part:
        return cls(inputs, items, _random(device))


def _random(device: torch.device) -> tuple[Tensor, ...]:
    cpu = torch.get_rng_state()
    return (cpu, torch.cuda.get_rng_state(device)) if device.type == "cuda" else (cpu,)


def _set_random(states: tuple[Tensor, ...], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)


def find_source(model: nn.Module, parts: list[Part], loss_of: Callable[[Part], Tensor], device: torch.device) -> str:
    """Where a step's numbers first stop being finite, in words; gradients that are there already are dropped.

    Args:
        model: the model, not wrapped.
        parts: the step's forwards, in order.
        loss_of: runs the forward of a part and returns its loss.
    """
    weight = next((name for name, p in model.named_parameters() if not finite(p)), None)
    if weight is not None:
        return f"the weight {weight} is not finite"
    before, training = _random(device), model.training
    try:
        for part in parts:
            model.zero_grad(set_to_none=True)
            _set_random(part.random, device)
            model.train()
            found = _run_again(model, part, loss_of)
            if found:
                return found
    except Exception as error:
        return f"the layer was not found, because the step could not be run again ({type(error).__name__}: {error})"
    finally:
        model.zero_grad(set_to_none=True)
        model.train(training)
        _set_random(before, device)
    return "no layer: run again, the step is finite"


def _run_again(model: nn.Module, part: Part, loss_of: Callable[[Part], Tensor]) -> str:
    outputs: list[str] = []
    gradients: list[str] = []
    with _watched(model, outputs, gradients):
        loss = loss_of(part)
        if outputs:
            return outputs[0]
        if not finite(loss):
            return "the loss itself; all layers give finite outputs"
        loss.backward()
    if gradients:
        return gradients[0]
    weight = next((name for name, p in model.named_parameters() if p.grad is not None and not finite(p.grad)), None)
    return f"the gradient of {weight}; the gradients of all layers' outputs are finite" if weight else ""


@contextlib.contextmanager
def _watched(model: nn.Module, outputs: list[str], gradients: list[str]) -> Iterator[None]:
    """Note what is not finite, in the order it comes up."""
    names = {module: name or "the model" for name, module in model.named_modules()}
    masks: list[str] = []

    def said(module: nn.Module, tensor: Tensor, what: str) -> str:
        kind = "nan" if bool(tensor.isnan().any()) else "inf"
        return f"the {what} of {names[module]} ({type(module).__name__}) is {kind}"

    def look(module: nn.Module, args: Any, output: Any) -> None:
        for tensor in tensors_in(output):
            if not finite(tensor):
                if bool((tensor.isnan() | (tensor == torch.inf)).any()):
                    note = f", after {masks[0]}" if masks else ""
                    outputs.append(said(module, tensor, "output") + note)
                elif not masks:  # minus infinity is how tokens and classes are left out
                    masks.append(f"minus infinity in the output of {names[module]}")
            if tensor.requires_grad:
                tensor.register_hook(lambda grad: None if finite(grad) else gradients.append(said_gradient(grad)))

        def said_gradient(grad: Tensor) -> str:
            return said(module, grad, "gradient of the output")

    hooks = [module.register_forward_hook(look) for module in names]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in what a module returned."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def finite(tensor: Tensor) -> bool:
    """Whether a tensor holds finite numbers only."""
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def first_broken(model: nn.Module) -> str | None:
    """The first trained weight that is not finite, or buffer that holds NaN; None where there is none."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not finite(parameter.detach()):
            return name
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and bool(buffer.isnan().any()):
            return name
    return None
