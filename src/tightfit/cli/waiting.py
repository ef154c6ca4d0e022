"""A progress bar for work whose length is only guessed; it appears when the work turns out to be long."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator

from tightfit.train.progress import PATIENCE_SECONDS


@contextlib.contextmanager
def waiting(description: str) -> Iterator[Callable[..., None]]:
    """After two seconds show a bar on standard error, if that is a terminal.

    Yields:
        A callable to tell how far the work is, as `tell(done, total)` or `tell(done)`; need not be called.
    """
    if not sys.stderr.isatty():
        yield lambda done, total=None: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(description, total=None)
    timer = threading.Timer(PATIENCE_SECONDS, bar.start)
    timer.daemon = True
    timer.start()

    def tell(done: int, total: int | None = None) -> None:
        bar.update(task, completed=done, total=total)

    try:
        yield tell
    finally:
        timer.cancel()
        timer.join()
        bar.stop()
