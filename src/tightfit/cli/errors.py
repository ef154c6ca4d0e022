"""Exit codes: how an error becomes one line and a number."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import Any

import typer
from typer.core import TyperGroup

DONE, FAILED, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130


class Group(TyperGroup):
    """A command group that ends with one line on standard error instead of a traceback."""

    debug = False

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.obj = {"debug": "--debug" in args}
        return super().parse_args(ctx, [arg for arg in args if arg != "--debug"])

    def invoke(self, ctx: Any) -> Any:
        try:
            with raised_on_sigterm():
                return super().invoke(ctx)
        except KeyboardInterrupt as error:
            code = getattr(error, "exit_code", INTERRUPTED)
            print("interrupted" if code == INTERRUPTED else "terminated", file=sys.stderr)
            raise typer.Exit(code) from None
        except BrokenPipeError:
            raise typer.Exit(FAILED) from None
        except Exception as error:
            code = exit_code(error)
            if code is None:
                raise
            if ctx.obj["debug"]:
                traceback.print_exc()
            print(f"tightfit: {one_line(error)}", file=sys.stderr)
            raise typer.Exit(code) from None


@contextlib.contextmanager
def raised_on_sigterm() -> Iterator[None]:
    """SIGTERM is raised as `Terminated`, so that what was begun is cleared away, where nobody else takes care of it."""
    from tightfit.core.errors import Terminated

    def terminate(number: int, frame: Any) -> None:
        raise Terminated

    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def exit_code(error: Exception) -> int | None:
    """2 for wrong input, 1 for a run that failed; None for what typer handles itself.

    >>> exit_code(FileNotFoundError("no such file")), exit_code(ZeroDivisionError())
    (2, 1)
    """
    if isinstance(error, typer.Exit | typer.Abort) or hasattr(error, "exit_code"):
        return None
    from tightfit.core.errors import SimulationError, TightfitError, TrainingError

    if isinstance(error, TrainingError | SimulationError):
        return FAILED
    if isinstance(error, TightfitError | FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError):
        return WRONG_INPUT
    return FAILED


def one_line(error: Exception) -> str:
    """An error's message on one line; an error of another library's says what kind it is.

    >>> one_line(ValueError("two" + chr(10) + "lines"))
    'ValueError: two lines (--debug shows where)'
    """
    from tightfit.core.errors import TightfitError

    text = " ".join(str(error).split())
    if isinstance(error, TightfitError):
        return text
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return f"{type(error).__name__}: {text} (--debug shows where)"
