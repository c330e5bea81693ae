"""Programs in processes that are forked from one that has imported everything (tests/helpers/warm.py): real processes,
whose start takes a second and not five, so that a test can afford many, and to kill them.

What is about the start itself starts a Python of its own (`tiny.command`).
"""

import multiprocessing
import os
import resource
import runpy
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.helpers.warm"])


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class At:
    """`action` is called in the process just before its `n`-th call of `function` ("module:name" or
    "module:Class.name", as its callers look it up)."""

    function: str
    n: int = 1
    action: Callable[[], Any] = kill

    def __post_init__(self) -> None:
        self._place()  # a name that is none fails in the test, and not in a process for which the test then waits

    def _place(self) -> tuple[Any, str]:
        module, _, name = self.function.partition(":")
        place: Any = import_module(module)
        *owners, name = name.split(".")
        for owner in owners:
            place = getattr(place, owner)
        getattr(place, name)
        return place, name

    def arm(self) -> None:
        place, name = self._place()
        original, calls = getattr(place, name), []

        def called(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == self.n:
                self.action()
            return original(*args, **kwargs)

        setattr(place, name, called)


@dataclass
class Start:
    """`python -m prefopt.PROGRAM ARGS` in `cwd`. `errors`: where stderr goes, if not into `log` too. `file_size`: bytes
    beyond which it can write no file. `curves`: whether runs get their curves.png, which takes half a second."""

    log: Path
    args: tuple[str, ...]
    env: dict[str, str]
    program: str = "train"
    cwd: Path | None = None
    errors: Path | None = None
    at: At | None = None
    file_size: int = resource.RLIM_INFINITY
    curves: bool = False

    def __call__(self) -> None:
        for number, file in ((1, self.log), (2, self.errors)):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if file else 1, number)
        os.environ.clear()
        os.environ.update(self.env)
        if self.cwd:
            os.chdir(self.cwd)
            sys.path.insert(0, str(self.cwd))
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.file_size, self.file_size))
        if not self.curves:
            import_module("prefopt.reporting.run_curves").draw = lambda *_: False  # type: ignore[attr-defined]
        if self.at:
            self.at.arm()
        name = f"prefopt.{self.program}"
        module = import_module(name)
        sys.argv = [str(module.__file__), *self.args]
        if hasattr(module, "main"):  # what is armed is this module, and not its copy
            module.main()
        else:
            runpy.run_module(name, run_name="__main__", alter_sys=True)


def start(log: Path, *args: str, env: dict[str, str] | None = None, **how: Any) -> BaseProcess:
    """The process, its output in `log`; `env`: what it has beside `tiny.ENVIRONMENT`; further arguments: `Start`."""
    from tests.helpers.tiny import ENVIRONMENT

    process = _context.Process(target=Start(log, args, ENVIRONMENT | (env or {}), **how))
    process.start()
    return process


def run(log: Path, *args: str, **how: Any) -> tuple[int, str]:
    """The exit code and the output."""
    process = start(log, *args, **how)
    process.join()
    assert process.exitcode is not None
    return process.exitcode, log.read_text()
