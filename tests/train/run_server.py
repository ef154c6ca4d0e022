"""A process that has everything imported and forks one `tightfit` command after another, each a process of its own.

A cold start takes ten seconds and more; a fork of this process a few milliseconds, and what it runs is the same command
with the same signals, limits and exit code. Requests and answers are lines of JSON on its standard input and output.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

LIMITS = {"file_bytes": resource.RLIMIT_FSIZE, "address_bytes": resource.RLIMIT_AS}


class Command:
    """A running command: its process, and its exit status once it has ended."""

    def __init__(self, server: Server, pid: int, log: Path):
        self._server, self.pid, self.log = server, pid, log
        self.started = time.monotonic()

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def running(self) -> bool:
        """Whether it has not ended (a process that has is a zombie until its server is told to go on)."""
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except FileNotFoundError:
            return False

    def wait(self) -> tuple[int, str]:
        """(exit code, or minus the signal; what it wrote)."""
        self._server.send({"wait": self.pid})
        status = self._server.receive()["status"]
        said = self.log.read_text() if self.log.exists() else ""  # killed before its first instruction
        return os.waitstatus_to_exitcode(status), said


class Server:
    """Starts commands; use as a context manager."""

    def __init__(self, folder: Path):
        self._folder, self._count = folder, 0
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()

    def send(self, request: dict) -> None:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()

    def receive(self) -> dict:
        return json.loads(self._process.stdout.readline())

    def start(self, *arguments: object, keep_all: bool = False, modules: bool = False, **limits: int) -> Command:
        """Start `tightfit ARGUMENTS` in a process of its own.

        Args:
            keep_all: no checkpoint is dropped.
            modules: later commands find imported what this one imports.
            limits: `file_bytes`; `address_bytes`, on top of what the process has.
        """
        self._count += 1
        log = self._folder / f"log-{self._count}.txt"
        request = {"arguments": [str(a) for a in arguments], "log": str(log), "keep_all": keep_all}
        self.send({**request, "modules": modules, "limits": limits})
        return Command(self, self.receive()["pid"], log)

    def run(self, *arguments: object, **options) -> tuple[int, str]:
        return self.start(*arguments, **options).wait()


def serve() -> None:
    import torch

    import tightfit.train.advice
    import tightfit.train.bench
    import tightfit.train.trainer  # noqa: F401

    torch.set_num_threads(1)
    gc.freeze()  # collections of the commands need not look at what the imports left
    learnt: dict[int, str] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            pid, status = os.waitpid(request["wait"], 0)
            if pid in learnt:
                _import_all(learnt.pop(pid))
            answer = {"status": status}
        else:
            pid = os.fork()
            if pid == 0:
                _become(request)
            if request["modules"]:
                learnt[pid] = request["log"]
            answer = {"pid": pid}
        print(json.dumps(answer), flush=True)


def _import_all(log: str) -> None:
    with contextlib.suppress(OSError):
        for name in Path(log + ".modules").read_text().split():
            if name not in sys.modules and not name.startswith("__"):
                with contextlib.suppress(BaseException):
                    importlib.import_module(name)
    gc.freeze()


def _become(request: dict) -> None:
    code = 70
    try:
        descriptor = os.open(request["log"], os.O_WRONLY | os.O_CREAT, 0o644)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        from tightfit.cli import main
        from tightfit.train import checkpoints

        if request["keep_all"]:
            checkpoints.drop_old = lambda folder: None
        for name, value in request["limits"].items():
            if name == "address_bytes":
                value += int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(LIMITS[name], (value, value))
        main(request["arguments"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        if request["modules"]:
            Path(request["log"] + ".modules").write_text(" ".join(sys.modules))
        os._exit(code)


if __name__ == "__main__":
    serve()
