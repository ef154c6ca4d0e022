"""Optimizers by name, as a training loop on the given device would make them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from tightfit.core.errors import SimulationError

Factory = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]

OPTIMIZERS = ("adamw", "adamw-foreach", "adamw-fused", "sgd", "sgd-momentum", "adafactor", "adamw-8bit")


def make_optimizer(choice: str | Factory, parameters: Iterable[torch.nn.Parameter], device: str):
    """An optimizer over `parameters`.

    "adamw", "sgd" and "sgd-momentum" take torch's own choice for the device: one parameter after another on the CPU,
    all at once (foreach) on a GPU.

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
        return EightBitAdamW(trainable)
    raise SimulationError(f"optimizer: got {choice!r}, accepted are {', '.join(OPTIMIZERS)} or a callable")


class EightBitAdamW(torch.optim.Optimizer):
    """The memory of bitsandbytes' AdamW8bit, without its arithmetic.

    Two moments of one byte per element with a float32 scale per block of 256 and a shared table of 256 levels each;
    parameters below 4096 elements keep float32 moments. The update is one kernel that allocates nothing.
    """

    block = 256
    smallest = 4096

    def __init__(self, parameters: Iterable[torch.nn.Parameter]):
        super().__init__(parameters, {})
        self.tables: list[torch.Tensor] = []

    def step(self, closure=None):
        """Make the state of parameters that have a gradient; values do not matter here."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and not self.state[parameter]:
                    self.state[parameter] = self._moments(parameter)

    def _moments(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        size, device = parameter.numel(), parameter.device
        if size < self.smallest:
            return {f"state{i}": torch.zeros(parameter.shape, dtype=torch.float32, device=device) for i in (1, 2)}
        if not self.tables:
            self.tables = [torch.zeros(256, device=device) for _ in range(2)]
        blocks = -(-size // self.block)
        state = {f"state{i}": torch.zeros(parameter.shape, dtype=torch.uint8, device=device) for i in (1, 2)}
        state |= {f"absmax{i}": torch.zeros(blocks, device=device) for i in (1, 2)}
        return state | {"qmap1": self.tables[0], "qmap2": self.tables[1]}
