"""`recompute`: keep an operator's inputs, and run it again in backward.

For operators without a backward of their own here: norms and activations written in plain torch, attention. It is
what checkpointing does, for one operator, with its output rebuilt for those who use it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tightfit.ops.autograd import refuse_second_derivative
from tightfit.ops.source import Rebuild, attach


def recompute(
    call: Callable[..., Tensor],
    *inputs: Tensor,
    parameters: tuple[Tensor, ...] = (),
    joint: bool = False,
    random: bool = False,
) -> Tensor:
    """`call(*inputs)`, of which only the inputs are kept; bit for bit what `call` gives.

    Args:
        call: from the inputs to one tensor; it may read `parameters` by itself.
        inputs: tensors, those that need a gradient and others.
        parameters: what else `call` reads that takes a gradient.
        joint: the output goes to one linear layer only, which forms the gradient of the output before it needs the
            output: then it runs this backward there, once for both.
        random: `call` draws random numbers, which must be the same again.

    Example:
        >>> x = torch.linspace(0, 1, 4, requires_grad=True)
        >>> recompute(torch.sin, x).sum().backward()
        >>> torch.equal(x.grad, torch.cos(x))
        True
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return call(*inputs)
    rerun = _Rerun(call, [t.requires_grad for t in inputs], joint)
    if random:
        rerun.random = random_state(inputs[0].device.type)
    out = _Recompute.apply(rerun, *inputs, *parameters)
    return attach(out, inputs, rerun)


class Joint(Rebuild):
    """Rebuilds an output in the backward of its one user, together with the backward of the operator itself.

    A subclass says in `backward` how to get (output, gradients) from what was kept and the output's gradient.
    """

    joint = True
    _done: tuple[Tensor, int, list[Tensor | None]] | None = None

    def make(self, kept, grad):
        if grad is None or not self.joint:
            return super().make(kept, grad)
        out, grads = self.backward(kept, (), grad)
        self._done = (grad, grad._version, grads)
        return out

    def backward(self, kept, parameters, grad) -> tuple[Tensor, list[Tensor | None]]:
        raise NotImplementedError

    def taken(self, grad: Tensor) -> list[Tensor | None] | None:
        """Gradients already formed for this very gradient of the output; None if the output had other users."""
        done, self._done = self._done, None
        if done is None:
            return None
        known, version, grads = done
        same = _memory(known) == _memory(grad) and known._version == version and known.numel() == grad.numel()
        return grads if same else None


class _Rerun(Joint):
    """Runs the call again, with its backward where that is asked for."""

    def __init__(self, call: Callable[..., Tensor], needs: list[bool], joint: bool):
        super().__init__(call)
        self.needs, self.joint = needs, joint
        self.random: Tensor | None = None

    @contextlib.contextmanager
    def as_in_forward(self, device_type: str) -> Iterator[None]:  # type: ignore[override]
        """Autocast and random state of the forward, for one call."""
        with super().as_in_forward(device_type):
            if self.random is None:
                yield
                return
            before = random_state(device_type)
            set_random_state(device_type, self.random)
            try:
                yield
            finally:
                set_random_state(device_type, before)

    def backward(self, kept, parameters, grad):
        """The output again, and the gradients of inputs and parameters."""
        inputs = [t.detach().requires_grad_(need) for t, need in zip(kept, self.needs)]
        # what this short graph keeps is no affair of hooks that look at, or move, what the step keeps
        apart = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
        with torch.enable_grad(), self.as_in_forward(grad.device.type), apart:
            out = self._make(*inputs)
        tensors = (*inputs, *parameters)
        wanted = [t for t in tensors if t.requires_grad]
        found = iter(torch.autograd.grad(out, wanted, grad.view(out.shape).to(out.dtype), allow_unused=True))
        return out.detach(), [next(found) if t.requires_grad else None for t in tensors]


def _memory(tensor: Tensor) -> tuple:
    return tensor.untyped_storage()._cdata, tensor.storage_offset()


def random_state(device_type: str) -> Tensor:
    """The state of the default generator of the current device."""
    return torch.cuda.get_rng_state() if device_type == "cuda" else torch.get_rng_state()


def set_random_state(device_type: str, state: Tensor) -> None:
    """Put a state of `random_state` back."""
    if device_type == "cuda":
        torch.cuda.set_rng_state(state)
    else:
        torch.set_rng_state(state)


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rerun, *tensors):
        ctx.rerun = rerun
        ctx.save_for_backward(*tensors)
        out = rerun._make(*tensors[: len(rerun.needs)])
        # a view would hand its own base, not this tensor, to the views that are made of it later
        return out if out._base is None else out.new_empty(0).set_(out)

    @staticmethod
    def backward(ctx, grad):
        refuse_second_derivative("recompute")
        grads = ctx.rerun.taken(grad)
        if grads is None:
            count = len(ctx.rerun.needs)
            saved = ctx.saved_tensors
            grads = ctx.rerun.backward(saved[:count], saved[count:], grad)[1]
        missing = len(ctx.needs_input_grad) - 1 - len(grads)
        return None, *grads, *[None] * missing
