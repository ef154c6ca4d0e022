"""What call edits need of a call: its arguments by name, its hidden states; and how a changed model is checked."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tightfit.core.errors import TightfitError, UnsupportedModelError


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """Names of a call's arguments, in order."""
    return tuple(inspect.signature(module.forward).parameters)


def named_call(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments by name.

    >>> named_call(nn.Linear(2, 2), (3,), {})
    {'input': 3}
    """
    return {**dict(zip(argument_names(module), args)), **kwargs}


def hidden_states(out: Any) -> Tensor:
    """The hidden states of a backbone's output."""
    return out[0] if isinstance(out, tuple) else out.last_hidden_state


def returns_dict(model: Any, given: bool | None) -> bool:
    """Whether a call's output has fields; `given` is its `return_dict`, None where it says nothing."""
    return bool(getattr(model.config, "return_dict", True) if given is None else given)


def pooled_place(ids: Tensor, padding: int) -> Tensor:
    """(B, 1): the column that a decoder's classifier reads, the last one whose id is not that of padding.

    >>> pooled_place(torch.tensor([[0, 7, 8, 0]]), 0).tolist()
    [[2]]
    """
    places = torch.arange(ids.shape[1], device=ids.device)
    return (places * ids.ne(padding)).argmax(1, keepdim=True)


@contextlib.contextmanager
def refusing(says: Callable[[str], str], *more: type[Exception]) -> Iterator[None]:
    """What a model's own code raises here is a refusal of the model; a lack of memory is none.

    Args:
        says: from the error, as words, to the message.
        more: kinds of errors beside RuntimeError, TypeError and ValueError.

    Raises:
        UnsupportedModelError: in place of such an error.
    """
    kinds: tuple[type[Exception], ...] = (RuntimeError, TypeError, ValueError, *more)
    try:
        yield
    except (TightfitError, torch.OutOfMemoryError):
        raise
    except kinds as error:
        raise UnsupportedModelError(says(f"{type(error).__name__}: {error}")) from error


@contextlib.contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """These modules, each for itself, are in evaluation mode for a while."""
    switched = [module for module in modules if module.training]
    for module in switched:
        module.training = False
    try:
        yield
    finally:
        for module in switched:
            module.training = True


def random_images(config: Any, like: Tensor) -> Tensor:
    """(2, channels, height, width): the same two random images each time, for a check of a model."""
    side = config.image_size if isinstance(config.image_size, (tuple, list)) else [config.image_size] * 2
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, getattr(config, "num_channels", 3), *side, generator=generator).to(like)


def mismatch(found: Tensor, expected: Tensor) -> str | None:
    """By how much a model that was changed is off, in words; None where that is rounding."""
    gap, size = (found - expected).abs().amax(), expected.abs().amax()
    limit = max(100 * torch.finfo(expected.dtype).eps, 1e-5)
    if bool(gap <= limit * size.clamp_min(1.0)):
        return None
    return f"off by {float(gap):.1e} (allowed {limit:.0e} of {float(size):.1e})"
