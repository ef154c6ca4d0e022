"""AdamW with 8-bit moments: bitsandbytes' own as transformers' Trainer sets it up, and what it takes for a plan."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from tightfit.core.errors import SimulationError

BLOCK = 256
SMALLEST = 4096


def embedding_tables(model: nn.Module) -> list[torch.Tensor]:
    """The weights of a model's embeddings: their moments stay in float32 under the Trainer's "adamw_8bit"."""
    return [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]


@functools.cache
def adamw_8bit() -> type[Any]:
    """bitsandbytes' `AdamW8bit` with one option more: `tables`, parameters whose moments keep 32 bits.

    The Trainer says the same by entries in bitsandbytes' global registry, which go by a parameter's place and outlive
    the run: a second optimizer in one process would find the first one's. Here the optimizer knows it itself.

    Raises:
        ImportError: bitsandbytes is not installed.
    """
    from bitsandbytes.optim import AdamW8bit

    class AdamW8bitWithTables(AdamW8bit):
        def __init__(self, params: Iterable[Any], *, tables: Iterable[torch.Tensor] = (), **options: Any):
            super().__init__(params, **options)
            self.tables = list(tables)

        def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
            parameter = group["params"][pindex]
            kept = any(parameter is table for table in self.tables)
            return super().get_config(gindex, pindex, group) | {"optim_bits": 32 if kept else 8}

        def state_dict(self) -> dict[str, Any]:
            # bitsandbytes nests its tensors for the sake of FSDP; flat ones can be written without a pickle
            return torch.optim.Optimizer.state_dict(self)

    return AdamW8bitWithTables


def modelled(optimizer: torch.optim.Optimizer, device: str) -> torch.optim.Optimizer:
    """The same optimizer where a simulated step can run it; bitsandbytes' AdamW as what it takes.

    Raises:
        SimulationError: an optimizer of bitsandbytes or torchao whose kernels a simulation cannot see into.
    """
    library = type(optimizer).__module__.split(".")[0]
    eight_bits = getattr(getattr(optimizer, "args", None), "optim_bits", None) == 8
    if library == "bitsandbytes" and eight_bits and getattr(optimizer, "optimizer_name", "") == "adam":
        return EightBitAdamW([p for group in optimizer.param_groups for p in group["params"]], device)
    if library in ("bitsandbytes", "torchao"):
        raise SimulationError(
            f"optimizer: {library}'s {type(optimizer).__name__} cannot be simulated; of theirs accepted is "
            f"bitsandbytes' AdamW8bit, also by the name 'adamw-8bit'. Measure a real step instead (tightfit.measure)"
        )
    return optimizer


class EightBitAdamW(torch.optim.Optimizer):
    """The memory of bitsandbytes' AdamW8bit, without its arithmetic.

    Two moments of one byte per element with a float32 scale per block of 256 and a shared table of 256 levels each;
    parameters below 4096 elements, and `tables`, keep float32 moments. On a GPU the update is one kernel that allocates
    nothing; on the CPU it unpacks both moments of a parameter and works on them with torch's operators.
    """

    def __init__(self, parameters: Iterable[torch.Tensor], device: str, tables: Iterable[torch.Tensor] = ()):
        super().__init__(parameters, {})
        self.device, self.tables = device, list(tables)
        self.levels: list[torch.Tensor] = []

    def step(self, closure=None):
        """Take what a step takes of parameters that have a gradient; values do not matter here."""
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is None:
                        continue
                    if not self.state[parameter]:
                        self.state[parameter] = self._moments(parameter)
                    if self.device == "cpu":
                        packed = "absmax1" in self.state[parameter]
                        (_step_packed if packed else _step_plain)(parameter, self.state[parameter])

    def _moments(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        size, device = parameter.numel(), parameter.device
        if size < SMALLEST or any(parameter is table for table in self.tables):
            return {f"state{i}": torch.zeros(parameter.shape, dtype=torch.float32, device=device) for i in (1, 2)}
        if not self.levels:
            self.levels = [torch.zeros(256, device=device) for _ in range(2)]
        blocks = -(-size // BLOCK)
        state = {f"state{i}": torch.zeros(parameter.shape, dtype=torch.uint8, device=device) for i in (1, 2)}
        state |= {f"absmax{i}": torch.zeros(blocks, device=device) for i in (1, 2)}
        return state | {"qmap1": self.levels[0], "qmap2": self.levels[1]}


def _step_packed(parameter: torch.Tensor, state: dict[str, torch.Tensor]) -> None:
    first, second = (torch.empty(parameter.shape, device=parameter.device) for _ in range(2))
    gradient = _scaled(parameter)
    wide = parameter.detach().float()
    denominator = second.sqrt() / 1.0
    first.add_(gradient)
    parameter.detach().copy_(wide)
    for moment in (first, second):
        codes, scales = moment.to(torch.uint8), torch.empty_like(state["absmax1"])
        del codes, scales
    del denominator


def _step_plain(parameter: torch.Tensor, state: dict[str, torch.Tensor]) -> None:
    gradient = _scaled(parameter)
    wide = parameter.detach().float()
    state["state1"].add_(gradient)
    update = state["state1"] / (state["state2"].sqrt() + 1.0)
    wide.add_(update)
    parameter.detach().copy_(wide)


def _scaled(parameter: torch.Tensor) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad.float() * 1.0
