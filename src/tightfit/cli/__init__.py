"""The command line: thin, it prints what the library returns.

Nothing heavy is imported before a command runs. Exit codes: 0 done, 1 the run failed, 2 the input is wrong (one
line on standard error; `--debug` shows the traceback), 130 Ctrl-C.
"""

from __future__ import annotations

from tightfit.cli.app import app, main

__all__ = ["app", "main"]
