"""A fake copy of a model, and real values beside the small tensors that control flow looks at.

The copy is `deepcopy` with every tensor replaced by a fake one of the same size, stride and type, so ties, classes,
hooks and state in `module.__dict__` survive and a model of any size costs nothing. Tensors on `meta` become fake
CPU tensors: on `meta` the attention kernels that a CPU step uses would not be chosen.

Models ask their batch questions ("is any position masked?") and take another path for another answer. A fake
tensor has no answer, so small tensors derived from the batch alone keep a real twin, and the answer is read there.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tightfit.core.host import is_mapped

VALUE_LIMIT_BYTES = 4 << 20
"""Twins larger than this are not kept; what asks for their values then takes the model's tracing path."""

SCALAR_BYTES = 64
"""Constants up to this size keep a twin whatever their type."""

_VALUE = "_tightfit_value"


def value_of(tensor: torch.Tensor) -> torch.Tensor | None:
    """The real twin of a fake tensor, or None."""
    return getattr(tensor, _VALUE, None)


def set_value(tensor: torch.Tensor, value: torch.Tensor | None) -> None:
    """Give a fake tensor its real twin, or take it away."""
    setattr(tensor, _VALUE, value)


@contextlib.contextmanager
def real_mode() -> Iterator[None]:
    """Run operators for real inside a simulation."""
    with unset_fake_temporarily(), torch.no_grad():
        yield


@dataclasses.dataclass
class FakeCopy:
    """A fake model with what its memory is.

    Attributes:
        model: the copy; its parameters, buffers and other tensors are fake.
        weights: fake tensors that the allocator holds (parameters, buffers, tensors kept as module attributes).
        host: fake tensors of host-side stores, which the allocator of the training device does not hold.
    """

    model: nn.Module
    weights: list[torch.Tensor]
    host: list[torch.Tensor]


class Faker(TorchFunctionMode):
    """Makes fake twins of tensors, one fake storage per real storage; as a mode it does so during `deepcopy`."""

    def __init__(self, mode: FakeTensorMode):
        super().__init__()
        self.mode = mode
        self.made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._storages: dict[int, torch.Tensor] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.__deepcopy__:
            source, memo = args
            if id(source) not in memo:
                memo[id(source)] = self(source)
            return memo[id(source)]
        if func is torch.Tensor.clone:
            return self(args[0])
        return func(*args, **(kwargs or {}))

    def __call__(self, source: torch.Tensor) -> torch.Tensor:
        """The fake twin of `source`, the same one for the same tensor object."""
        if id(source) in self.made:
            return self.made[id(source)][1]
        fake = self._fake(source)
        if source.requires_grad and source.is_leaf:
            fake.requires_grad_()
        if isinstance(source, nn.Parameter):
            fake = nn.Parameter(fake, requires_grad=source.requires_grad)
        for key, item in vars(source).items():
            if not hasattr(fake, key) and not isinstance(item, torch.Tensor):
                setattr(fake, key, item)
        self.made[id(source)] = (source, fake)  # the source is held so that its id stays its own
        return fake

    def _fake(self, source: torch.Tensor) -> torch.Tensor:
        if is_traceable_wrapper_subclass(source) or source.layout != torch.strided:
            return self.mode.from_tensor(source.detach())
        storage = source.untyped_storage()
        item = source.element_size()
        with self.mode, torch.no_grad():
            if storage.nbytes() == source.numel() * item and storage._cdata not in self._storages:
                fake = torch.empty_strided(source.shape, source.stride(), dtype=source.dtype, device="cpu")
                self._storages[storage._cdata] = fake
            else:
                base = self._storages.get(storage._cdata)
                if base is None:
                    base = torch.empty(storage.nbytes(), dtype=torch.uint8, device="cpu")
                    self._storages[storage._cdata] = base
                flat = base.detach().as_strided((base.untyped_storage().nbytes() // base.element_size(),), (1,), 0)
                flat = flat if flat.dtype == source.dtype else flat.view(source.dtype)
                fake = flat.as_strided(source.shape, source.stride(), source.storage_offset())
        if is_small_index(source):
            set_value(fake, source.detach().clone())  # a copy: an in-place operator must not reach the user's
        return fake


def is_small_index(tensor: torch.Tensor) -> bool:
    """Whether a tensor is real, and small integers or booleans: what control flow looks at."""
    if tensor.is_meta or type(tensor).__name__ == "FakeTensor" or tensor.device.type != "cpu":
        return False
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        return False
    return tensor.numel() * tensor.element_size() <= VALUE_LIMIT_BYTES


def is_small_value(tensor: torch.Tensor) -> bool:
    """The same, or a real constant of a few bytes."""
    if is_small_index(tensor):
        return True
    real = not tensor.is_meta and type(tensor).__name__ != "FakeTensor" and tensor.device.type == "cpu"
    return real and tensor.numel() * tensor.element_size() <= SCALAR_BYTES


def fake_copy(model: nn.Module, mode: FakeTensorMode, lists: dict[int, list[nn.Module]] | None = None) -> FakeCopy:
    """Copy `model` into `mode`; the model itself is not touched.

    Args:
        model: real, on `meta`, or transformed already.
        mode: the mode the fake tensors belong to.
        lists: id of a ModuleList -> the modules to keep of it, for a model with fewer blocks.
    """
    memo: dict[int, Any] = {}
    faker = Faker(mode)
    for parameter in model.parameters():
        memo[id(parameter)] = faker(parameter)
    with faker:
        for module in model.modules():
            if lists and id(module) in lists:
                short = copy.copy(module)
                short.__dict__ = dict(module.__dict__)
                short._modules = {str(i): block for i, block in enumerate(lists[id(module)])}
                memo[id(module)] = copy.deepcopy(short, memo)
        twin = copy.deepcopy(model, memo)
    held: list[torch.Tensor] = []
    host: list[torch.Tensor] = []
    own = {id(t) for t in _module_tensors(twin)}
    for source, fake in faker.made.values():
        if id(fake) in own:
            (host if _is_host_file(source) else held).append(fake)
        elif not isinstance(source, nn.Parameter) or lists is None:
            (host if source.is_meta or _is_host_file(source) else held).append(fake)
    for source in shared_tensors(twin):
        # the mode makes one fake storage for a real one and remembers it, so views made later are known
        (host if _is_host_file(source) else held).append(mode.from_tensor(source.detach()))
    return FakeCopy(twin, held, host)


def shared_tensors(model: nn.Module) -> list[torch.Tensor]:
    """Real tensors that a copied model still refers to: state whose owner shares it between copies."""
    found: dict[int, torch.Tensor] = {}
    seen: set[int] = set()
    rest: list[Any] = [model]
    while rest:
        item = rest.pop()
        if id(item) in seen or isinstance(item, (str, bytes, int, float, type, FakeTensor)):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            if not item.is_meta and item.layout == torch.strided:
                found[item.untyped_storage()._cdata] = item
        elif isinstance(item, dict):
            rest.extend(item.values())
        elif isinstance(item, (list, tuple, set, frozenset)):
            rest.extend(item)
        elif isinstance(getattr(item, "__dict__", None), dict) and not (
            inspect.isroutine(item) or inspect.ismodule(item)
        ):
            rest.append(vars(item))
    return list(found.values())


def _is_host_file(source: torch.Tensor) -> bool:
    return not source.is_meta and source.layout == torch.strided and is_mapped(source)


def _module_tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        yield from (item for item in vars(module).values() if isinstance(item, torch.Tensor))


@contextlib.contextmanager
def answering_masks() -> Iterator[None]:
    """Let transformers look at mask values while the simulation runs, where they are known.

    transformers builds the 4-D mask of a batch without padding only when tracing, and counts a fake tensor as
    tracing. Without this the simulated step keeps a mask that the real one never has.
    """
    try:
        from transformers import masking_utils
    except ImportError:
        yield
        return
    stock = getattr(masking_utils, "is_tracing", None)
    if stock is None:
        yield
        return

    def is_tracing(tensor=None) -> bool:
        if isinstance(tensor, torch.Tensor) and value_of(tensor) is not None:
            return False
        return stock(tensor)

    masking_utils.is_tracing = is_tracing  # type: ignore[assignment]
    try:
        yield
    finally:
        masking_utils.is_tracing = stock
