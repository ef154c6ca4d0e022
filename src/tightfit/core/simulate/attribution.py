"""Which module an operator of the forward or backward pass belongs to, with public hooks only.

Forward hooks push and pop the module's path. Where a module's output leaves it, the output's autograd node is
marked with the path, and so is an input's node with the path of the caller, so that in backward the last mark
passed says where the engine is. Full backward hooks would insert identity functions and change the step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

_MARK = "tightfit.module"


class Attribution:
    """Follows which module runs; `path(phase)` names it ("" is the model itself or no module at all)."""

    def __init__(self, model: nn.Module):
        self.names = {id(module): name for name, module in model.named_modules()}
        self.stack: list[str] = []
        self.backward = ""

    def path(self, phase: int) -> str:
        """Name of the module that runs now."""
        if self.stack:
            return self.stack[-1]
        return self.backward if phase in _BACKWARD_PHASES else ""

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Follow the model's modules while the context is open."""
        handles = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args) -> None:
        name = self.names.get(id(module))
        if name is None:
            return
        parent = self.stack[-1] if self.stack else ""
        for item in args:
            if isinstance(item, torch.Tensor):
                self._mark(item, parent)
        self.stack.append(name)

    def _leave(self, module: nn.Module, args, output) -> None:
        name = self.names.get(id(module))
        if name is None:
            return
        while self.stack and self.stack.pop() != name:  # modules left by an exception
            pass
        if isinstance(output, torch.Tensor):
            self._mark(output, name)
        elif isinstance(output, (tuple, list)):
            for item in output:
                self._mark(item, name)
        elif isinstance(output, dict):
            for item in output.values():
                self._mark(item, name)

    def _mark(self, tensor, name: str) -> None:
        # other subclasses may answer by computing what they stand for
        node: Any = tensor.grad_fn if isinstance(tensor, FakeTensor) else None
        if node is None or _MARK in node.metadata:
            return
        node.metadata[_MARK] = name

        def passed(_, self=self, name=name):
            self.backward = name

        node.register_prehook(passed)


_BACKWARD_PHASES = (2, 3)
