"""Optimizers by name, as a training loop on the given device would make them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from tightfit.core.errors import SimulationError
from tightfit.core.simulate.eight_bit import EightBitAdamW

Factory = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]

OPTIMIZERS = ("adamw", "adamw-foreach", "adamw-fused", "sgd", "sgd-momentum", "adafactor", "adamw-8bit")


def make_optimizer(
    choice: str | Factory,
    parameters: Iterable[torch.nn.Parameter],
    device: str,
    tables: Iterable[torch.Tensor] = (),
):
    """An optimizer over `parameters`.

    "adamw", "sgd" and "sgd-momentum" take torch's own choice for the device: one parameter after another on the CPU,
    all at once (foreach) on a GPU. "adamw-8bit" takes the memory of bitsandbytes' AdamW8bit and trains nothing.

    Args:
        tables: the weights of embeddings, whose moments "adamw-8bit" keeps in float32, as the Trainer's does.

    Raises:
        SimulationError: an unknown name.
    """
    trainable = [p for p in parameters if p.requires_grad]
    if not trainable:
        raise SimulationError("optimizer: the model has no parameter that requires grad, so there is no step")
    if callable(choice):
        return choice(trainable)
    foreach = device == "cuda"
    if choice == "adamw":
        return torch.optim.AdamW(trainable, lr=1e-4, foreach=foreach)
    if choice == "adamw-foreach":
        return torch.optim.AdamW(trainable, lr=1e-4, foreach=True)
    if choice == "adamw-fused":
        return torch.optim.AdamW(trainable, lr=1e-4, fused=True)
    if choice == "sgd":
        return torch.optim.SGD(trainable, lr=1e-4, foreach=foreach)
    if choice == "sgd-momentum":
        return torch.optim.SGD(trainable, lr=1e-4, momentum=0.9, foreach=foreach)
    if choice == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(trainable, lr=1e-4, scale_parameter=False, relative_step=False)
    if choice == "adamw-8bit":
        return EightBitAdamW(trainable, device, tables)
    given = f"the object {type(choice).__name__}" if isinstance(choice, torch.optim.Optimizer) else repr(choice)
    raise SimulationError(
        f"optimizer: got {given}, accepted are {', '.join(OPTIMIZERS)} or a callable from parameters to an optimizer, "
        f"such as torch.optim.AdamW"
    )
