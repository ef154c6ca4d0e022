"""Ctrl-C and SIGTERM: the step is finished, a checkpoint written, and the process ends with 130 or 143."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from tightfit.core import processes
from tightfit.core.errors import Terminated

ONE_PRESS_SECONDS = 1.0
"""Under a launcher one Ctrl-C arrives twice, from the terminal and from the launcher."""


class StopRequest:
    """Whether a run was asked to stop, and by what.

    Attributes:
        signal: the number of the signal; 0 until there is one.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._since = 0.0

    def __bool__(self) -> bool:
        return self.signal != 0

    def error(self) -> KeyboardInterrupt:
        """What ends the command."""
        return Terminated() if self.signal == signal.SIGTERM else KeyboardInterrupt()

    def receive(self, number: int) -> bool:
        """Note a signal; True where it asks to stop at once, which only a second Ctrl-C does."""
        now = time.monotonic()
        patience = ONE_PRESS_SECONDS if processes.launched() > 1 else 0.0
        again = self.signal == number == signal.SIGINT and now - self._since > patience
        if not self.signal:
            self.signal, self._since = number, now
        return again

    def agree(self, device: torch.device) -> bool:
        """Whether any process was asked to stop; every one calls this after each step, so that all stop after one."""
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized()):
            return bool(self)
        asked = torch.tensor(self.signal, device=device)
        distributed.all_reduce(asked, distributed.ReduceOp.MAX)
        self.signal = self.signal or int(asked)  # one that came meanwhile is agreed on after the next step
        return bool(asked)


@contextlib.contextmanager
def stopping_on_signals(request: StopRequest, echo: Callable[[str], None]) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM lets the step finish and saves; a second Ctrl-C stops at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: Any) -> None:
        first = not request
        if request.receive(number):
            raise KeyboardInterrupt
        if first:
            again = "; press Ctrl-C again to stop at once" if number == signal.SIGINT else ""
            with contextlib.suppress(RuntimeError):  # the signal came while something was being printed
                echo(f"stopping after this step{again}")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
