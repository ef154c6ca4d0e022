"""What tasks own: memory in every block, a class token, a head; trained as parameters, held as buffers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tightfit.core.new_modules import fresh
from tightfit.methods.learnable_memory.records import MEMORY

TASKS = "tight_tasks"
"""Name of the module that holds class tokens and heads."""
STD = 0.02
PREFIX = "task_"


class BlockMemory(nn.Module):
    """The memory of one block, E (m, d) of each task."""

    def of(self, task: str) -> Tensor:
        return getattr(self, PREFIX + task)


class Task(nn.Module):
    """A class token (1, 1, d) and a head."""

    def __init__(self, width: int, labels: int):
        super().__init__()
        self.cls = nn.Parameter(torch.randn(1, 1, width) * STD)
        self.head = nn.Linear(width, labels)
        nn.init.normal_(self.head.weight, std=STD)
        nn.init.zeros_(self.head.bias)

    def logits(self, hidden: Tensor) -> Tensor:
        """(B, labels) of the row (B, d)."""
        return self.head(hidden.to(self.head.weight.dtype))


class Tasks(nn.Module):
    """The tasks by name."""

    def of(self, task: str) -> Task:
        return getattr(self, PREFIX + task)


def memory_of(model: nn.Module, task: str, tokens: int, width: int, seed: int) -> BlockMemory:
    """A block's memory with the rows of one task."""

    def make() -> BlockMemory:
        memory = BlockMemory()
        memory.register_parameter(PREFIX + task, nn.Parameter(torch.randn(tokens, width) * STD))
        return memory

    return fresh(model, seed, make)


def task_of(model: nn.Module, width: int, labels: int, seed: int) -> Task:
    """A new task's class token and head."""
    return fresh(model, seed, lambda: Task(width, labels))


def owners(model: nn.Module, blocks: str) -> list[nn.Module]:
    """The modules that hold what tasks own: one for each block, and the one with class tokens and heads."""
    inside: Any = model.get_submodule(blocks)
    return [*(block._modules[MEMORY] for block in inside), model._modules[TASKS]]


def hold(module: nn.Module, task: str) -> None:
    """Turn what a task owns in a module into buffers: it no longer trains, and is saved."""
    _turned(module, task, parameters=False)


def release(module: nn.Module, task: str) -> None:
    """Turn it back into parameters."""
    _turned(module, task, parameters=True)


def _turned(module: nn.Module, task: str, *, parameters: bool) -> None:
    own = module._modules.get(PREFIX + task)
    for owner, names in [(part, None) for part in own.modules()] if own is not None else [(module, {PREFIX + task})]:
        table: Any = owner._buffers if parameters else owner._parameters
        for name in [n for n, t in table.items() if t is not None and (names is None or n in names)]:
            value = table.pop(name).detach()
            if parameters:
                owner.register_parameter(name, nn.Parameter(value))
            else:
                owner.register_buffer(name, value)


def drop(module: nn.Module, task: str) -> None:
    """Remove what a task owns."""
    delattr(module, PREFIX + task)
