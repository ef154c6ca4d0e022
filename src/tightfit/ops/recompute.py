"""`recompute`: keep an operator's inputs, and run it again in backward.

For operators without a backward of their own here: norms and activations written in plain torch, attention. It is
what checkpointing does, for one operator, with its output rebuilt for those who use it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from tightfit.ops.autograd import (
    first_gradient,
    inner_gradients,
    no_view,
    refuse_second_derivative,
    save_beside,
    saved_apart,
)
from tightfit.ops.codec import Codec, Kept
from tightfit.ops.source import Rebuild, attach


def recompute(
    call: Callable[..., Tensor],
    *inputs: Tensor,
    parameters: tuple[Tensor, ...] = (),
    joint: bool = False,
    random: bool = False,
    codec: Codec | None = None,
) -> Tensor:
    """`call(*inputs)`, of which only the inputs are kept; bit for bit what `call` gives.

    Args:
        call: from the inputs to one tensor; it may read `parameters` by itself.
        inputs: tensors, those that need a gradient and others.
        parameters: what else `call` reads that takes a gradient.
        joint: the output goes to one linear layer only, which forms the gradient of the output before it needs the
            output: then it runs this backward there, once for both.
        random: `call` draws random numbers, which must be the same again.
        codec: keeps those of the inputs that need a gradient in its code.

    Example:
        >>> x = torch.linspace(0, 1, 4, requires_grad=True)
        >>> recompute(torch.sin, x).sum().backward()
        >>> torch.equal(x.grad, torch.cos(x))
        True
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return call(*inputs)
    rerun = _Rerun(call, inputs, parameters, joint, codec)
    if random:
        rerun.random = random_state(inputs[0].device.type)
    out, *packed = _Recompute.apply(rerun, *inputs, *parameters)
    return attach(out, rerun.kept_of(inputs, packed), rerun)


class Joint(Rebuild):
    """Rebuilds an output in the backward of its one user, together with the backward of the operator itself.

    A subclass says in `backward` how to get (output, gradients) from what was kept and the output's gradient.
    """

    joint = True
    parameters: tuple[Tensor, ...] = ()
    _done: tuple[Tensor, int, list[Tensor | None]] | None = None

    def make(self, kept, grad):
        if grad is None or not self.joint:
            return super().make(kept, grad)
        out, grads = self.backward(kept, self.parameters, grad)
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

    def __init__(
        self,
        call: Callable[..., Tensor],
        inputs: Sequence[Tensor],
        parameters: tuple[Tensor, ...],
        joint: bool,
        codec: Codec | None,
    ):
        super().__init__(self.again)
        self.call, self.joint = call, joint
        self.parameters = parameters if joint else ()
        self.needs = [t.requires_grad for t in inputs]
        self.coded = Kept(codec, *(t for t, need in zip(inputs, self.needs) if need))
        self.random: Tensor | None = None

    def kept_of(self, inputs: Sequence[Tensor], packed: Sequence[Tensor]) -> list[Tensor]:
        """What is kept of the inputs: the codes of some, then the others."""
        return [*packed, *(t for t, need in zip(inputs, self.needs) if not (packed and need))]

    def inputs_of(self, kept: Sequence[Tensor]) -> list[Tensor]:
        """The inputs, in their order."""
        if self.coded.codec is None:
            return list(kept)
        count = len(kept) - self.needs.count(False)
        coded, others = iter(self.coded.again(kept[:count])), iter(kept[count:])
        return [next(coded if need else others) for need in self.needs]

    def again(self, *kept: Tensor) -> Tensor:
        return self.call(*self.inputs_of(kept))

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
        inputs = [t.detach().requires_grad_(need) for t, need in zip(self.inputs_of(kept), self.needs)]
        with torch.enable_grad(), self.as_in_forward(grad.device.type), saved_apart():
            out = self.call(*inputs)
        tensors = (*inputs, *parameters)
        wanted = [t for t in tensors if t.requires_grad]
        found = iter(inner_gradients([out], wanted, [grad.view(out.shape).to(out.dtype)]))
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
        inputs, parameters = tensors[: len(rerun.needs)], tensors[len(rerun.needs) :]
        packed = rerun.coded.encode(*(t for t, need in zip(inputs, rerun.needs) if need))
        kept = rerun.kept_of(inputs, packed)
        ctx.rerun, ctx.count = rerun, len(kept)
        save_beside(ctx, packed, *kept, *parameters)
        return no_view(rerun.call(*inputs)), *packed

    @staticmethod
    @first_gradient
    def backward(ctx, grad):
        refuse_second_derivative("recompute")
        grads = ctx.rerun.taken(grad)
        if grads is None:
            saved = ctx.saved_tensors
            grads = ctx.rerun.backward(saved[: ctx.count], saved[ctx.count :], grad)[1]
        missing = len(ctx.needs_input_grad) - 1 - len(grads)
        return None, *grads, *[None] * missing
