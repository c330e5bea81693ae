"""Programs in processes that are forked from one that has imported everything: real processes, whose start takes a
second and not five, so that a test can afford to kill many."""

import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.tiny import ENVIRONMENT

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.warm"])


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class At:
    """`action` is called in the process just before its `n`-th call of `function` ("module:name" or
    "module:Class.name", as its callers look it up)."""

    function: str
    n: int = 1
    action: Callable[[], Any] = kill

    def arm(self) -> None:
        module, _, name = self.function.partition(":")
        place: Any = import_module(module)
        *owners, name = name.split(".")
        for owner in owners:
            place = getattr(place, owner)
        original, calls = getattr(place, name), []

        def called(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == self.n:
                self.action()
            return original(*args, **kwargs)

        setattr(place, name, called)


def start(
    log: Path,
    *args: str,
    program: str = "train",
    env: dict[str, str] | None = None,
    at: At | None = None,
    file_size: int = resource.RLIM_INFINITY,
) -> BaseProcess:
    """`python -m prefopt.PROGRAM args`, its output in `log`. `file_size`: bytes beyond which it can write no file."""
    process = _context.Process(target=_main, args=(log, args, program, env or {}, at, file_size))
    process.start()
    return process


def run(log: Path, *args: str, **how: Any) -> tuple[int, str]:
    """The exit code and the output."""
    process = start(log, *args, **how)
    process.join()
    assert process.exitcode is not None
    return process.exitcode, log.read_text()


def _main(log: Path, args: tuple[str, ...], program: str, env: dict[str, str], at: At | None, file_size: int) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.clear()
    os.environ.update(ENVIRONMENT | env)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    if at:
        at.arm()
    sys.argv = [program, *args]
    import_module(f"prefopt.{program}").main()
