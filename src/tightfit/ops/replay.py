"""Running something again as it ran before: random state, autocast, and how its module stood."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tightfit.ops.recompute import random_state, set_random_state


def drops(module: nn.Module) -> bool:
    """Whether anything in a module drops at random now, going by its settings."""
    for part in module.modules():
        if not part.training:
            continue
        rates = [value for key, value in vars(part).items() if "drop" in key and isinstance(value, float)]
        if isinstance(part, nn.modules.dropout._DropoutNd):
            rates.append(part.p)
        if any(rate > 0 for rate in rates):
            return True
    return False


def _moved(kind: str, state: Tensor) -> bool:
    return not torch.equal(state, random_state(kind))


class _Stand:
    """The mode of one part of a module, and the parameters in it: one call may have been given others.

    Where a process group is up the parameters are left alone; FSDP puts others there behind each use.
    """

    def __init__(self, part: nn.Module):
        self.part, self.training = part, part.training
        self.parameters = {} if dist.is_available() and dist.is_initialized() else dict(part._parameters)

    def left(self) -> bool:
        """Whether the part stands otherwise now."""
        now = self.part._parameters
        return self.part.training != self.training or any(now.get(n) is not p for n, p in self.parameters.items())

    def restore(self) -> None:
        """The part stands so again."""
        self.part.training = self.training
        self.part._parameters.update(self.parameters)


class Replay:
    """Random and autocast state as they are now.

    Args:
        device_type: where the part runs.
        random: whether it may draw random numbers.
        module: what runs; its modes and parameters (`torch.func.functional_call` gives others) are noted too.
    """

    def __init__(self, device_type: str, random: bool, module: nn.Module | None = None):
        self.kinds = list(dict.fromkeys((device_type, "cpu")))
        self.autocast = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in self.kinds
            if torch.amp.is_autocast_available(kind)
        ]
        self.cache = torch.is_autocast_cache_enabled()
        self.random = {kind: random_state(kind) for kind in self.kinds} if random else {}
        self.stands = [] if module is None else [_Stand(part) for part in module.modules()]

    def settle(self, draws: bool, real: bool) -> None:
        """The run is over: let go of the random state where no number was drawn.

        Args:
            draws: numbers are drawn, going by the settings.
            real: the run drew where it draws; a simulated one does not.
        """
        if not draws and not (real and any(_moved(kind, state) for kind, state in self.random.items())):
            self.random = {}

    def go_on(self) -> None:
        """The next run begins with the random state that is there now."""
        self.random = {kind: random_state(kind) for kind in self.random}

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """The same states for one run; what they were outside is put back."""
        before = {kind: random_state(kind) for kind in self.random}
        moved = [stand for stand in self.stands if stand.left()]
        now = [_Stand(stand.part) for stand in moved]
        with contextlib.ExitStack() as stack:
            for kind, enabled, dtype in self.autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=self.cache))
            for kind, state in self.random.items():
                set_random_state(kind, state)
            try:
                for stand in moved:
                    stand.restore()
                yield
            finally:
                for stand in now:
                    stand.restore()
                for kind, state in before.items():
                    set_random_state(kind, state)


@contextlib.contextmanager
def own_casts() -> Iterator[None]:
    """Autocast must not remember weights cast without gradients: the run with gradients would use them."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
