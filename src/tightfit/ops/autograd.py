"""What the operators' backwards have in common."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge


def refuse_second_derivative(name: str) -> None:
    """Called in a backward. Raises: RuntimeError under create_graph=True, where a plain result would be wrong."""
    # once_differentiable would let the second derivative vanish silently under a plain `loss.backward()`
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"{name} cannot be differentiated twice, and create_graph=True asks for it")


def save_beside(ctx: Any, codes: Sequence[Tensor], *saved: Tensor | None) -> None:
    """Save tensors for backward, `codes` among them or not, which are a function's outputs behind the first.

    They are outputs so that they are kept once, for others too. Nobody sends them a gradient, and autograd makes no
    zeros of their size in backward, which must be a `first_gradient`.
    """
    ctx.mark_non_differentiable(*codes)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*saved)


def first_gradient(backward: Callable[[Any, Tensor], Any]) -> Callable[..., Any]:
    """A backward from the first output's gradient alone; where nothing came to that one either, nothing goes on."""

    @functools.wraps(backward)
    def run(ctx: Any, grad: Tensor | None, *_: None) -> Any:
        return (None,) * len(ctx.needs_input_grad) if grad is None else backward(ctx, grad)

    return run


def without_graph(tensor: Tensor) -> Tensor:
    """A tensor as a saved-tensor hook should keep it.

    A node that keeps its own output would otherwise keep itself alive, for ever where it gets no gradient.
    """
    return tensor if tensor.grad_fn is None else tensor.detach()


def no_view(out: Tensor) -> Tensor:
    """An output that a function may return, in the same memory.

    A view would hand its own base, not this tensor, to the views that are made of it later, and nobody could write
    to it in place.
    """
    return out if out._base is None else out.new_empty(0).set_(out)  # type: ignore[call-overload]


def saved_apart() -> torch.autograd.graph.saved_tensors_hooks:
    """A context for a short graph inside a backward: what it keeps is no affair of hooks on what the step keeps."""
    return torch.autograd.graph.saved_tensors_hooks(without_graph, lambda tensor: tensor)


def inner_gradients(
    roots: Sequence[Tensor] | Sequence[GradientEdge], wanted: Sequence[Tensor], grads: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """Gradients that a backward makes by a graph of its own and hands on; None where there is none.

    What is handed on reaches the hooks of the parameters among `wanted`, so they must not run here as well.
    """
    with _unhooked(wanted):
        return torch.autograd.grad(roots, wanted, grads, allow_unused=True)


@contextlib.contextmanager
def _unhooked(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Hooks on the gradients of these tensors (`Tensor.register_hook`) do not run."""
    tables = [table for t in tensors if (table := t._backward_hooks)]
    held = [dict(table) for table in tables]
    for table in tables:
        table.clear()  # the table itself is what autograd looks into
    try:
        yield
    finally:
        for table, hooks in zip(tables, held):
            table.update(hooks)


def version(tensor: Tensor) -> int:
    """How often a tensor has been written to; 0 for one of inference mode, where nobody counts."""
    return 0 if tensor.is_inference() else tensor._version


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype autocast casts products to on this device now, or None."""
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def cast_for_autocast(x: Tensor, *others: Tensor | None) -> list:
    """The tensors as autocast would hand them to a product; unchanged without autocast."""
    dtype = autocast_dtype(x.device.type)
    tensors = (x, *others)
    return list(tensors) if dtype is None else [t if t is None else t.to(dtype) for t in tensors]
