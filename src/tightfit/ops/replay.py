"""Running something again as it ran before: random state and autocast."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
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


class Replay:
    """Random and autocast state as they are now.

    Args:
        device_type: where the part runs.
        random: whether it may draw random numbers.
    """

    def __init__(self, device_type: str, random: bool):
        self.kinds = list(dict.fromkeys((device_type, "cpu")))
        self.autocast = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in self.kinds
            if torch.amp.is_autocast_available(kind)
        ]
        self.cache = torch.is_autocast_cache_enabled()
        self.random = {kind: random_state(kind) for kind in self.kinds} if random else {}

    def settle(self, draws: bool, real: bool) -> None:
        """The run is over: let go of the random state where no number was drawn.

        Args:
            draws: numbers are drawn, going by the settings.
            real: the run drew where it draws; a simulated one does not.
        """
        if not draws and not (real and any(_moved(kind, state) for kind, state in self.random.items())):
            self.random = {}

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """The same states for one run; what they were outside is put back."""
        before = {kind: random_state(kind) for kind in self.random}
        with contextlib.ExitStack() as stack:
            for kind, enabled, dtype in self.autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=self.cache))
            for kind, state in self.random.items():
                set_random_state(kind, state)
            try:
                yield
            finally:
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
