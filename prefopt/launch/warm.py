"""Jobs as forks of a process that has made their imports, which take longer than the start of a small job.

A job that is forked is a process like any other: with its own session, log, environment and random state, the threads
that its environment asks for, and its own end. The warm process itself computes nothing, because what a fork inherits
of a thread or of CUDA is broken. It tries a fork first; where that leaves a thread or CUDA behind it, or where there is
no Linux, jobs are started as fresh processes.
"""

import atexit
import contextlib
import ctypes
import gc
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

log = logging.getLogger(__name__)

FLAG = "--warm"  # `python -m prefopt.job --warm FOLDER` is the warm process, for jobs such as that in FOLDER
READY = "ready"
PR_SET_CHILD_SUBREAPER = 36  # of sys/prctl.h
# Environment of the warm process alone. Arrow's spare allocator begins no thread. PyTorch asks the driver's library how
# many GPUs there are, and not CUDA, after which no fork could use them.
FORKABLE = {"JE_ARROW_MALLOC_CONF": "background_thread:false", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}


class JobStarter:
    """Starts jobs: as forks of a warm process, and as fresh processes where it cannot. Jobs outlive it.

    A job that is forked becomes a child of this process: its parent ends at once, and orphans are made to come here
    (`prctl`). So the launcher sees how it ends, whatever happens to the warm process.
    """

    def __init__(self, environment: dict[str, str], like: Path | None):
        """Jobs get these environment variables. `like` is the folder of one of them: a process begins to warm up for
        such jobs. None: all are fresh processes."""
        self.environment = environment
        self.warm: subprocess.Popen[str] | None = None
        if like is not None and adopt_orphans(True):
            self.warm = subprocess.Popen(
                [sys.executable, "-m", "prefopt.job", FLAG, str(like)],
                env=FORKABLE | environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,  # as of a job: Ctrl-C reaches the launcher only
            )

    def wait(self) -> None:
        """Until the imports are made. Says so where they cannot be made for all jobs at once."""
        if self.warm and (answer := self._answer()) != READY:
            log.info(f"  every job makes its imports itself: {answer or 'the process that was to make them has ended'}")
            self.close()

    def start(self, folder: Path, environment: dict[str, str]) -> "subprocess.Popen[bytes] | Adopted":
        """Start the job in `folder`, whose log.txt is there, with these environment variables beside those of all."""
        if self.warm:
            assert self.warm.stdin
            changes = {name: self.environment.get(name) for name in FORKABLE} | environment
            with contextlib.suppress(BrokenPipeError):
                self.warm.stdin.write(json.dumps({"folder": str(folder), "environment": changes}) + "\n")
                self.warm.stdin.flush()
            if (pid := self._answer()).isdecimal():
                return Adopted(int(pid))
            log.info("  from now on every job makes its imports itself: the process that had made them has ended")
            self.close()
        with (folder / "log.txt").open("ab") as file:
            return subprocess.Popen(
                [sys.executable, "-m", "prefopt.job", str(folder)],
                env=self.environment | environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def close(self) -> None:
        """End the warm process. May be called again."""
        if self.warm:
            with contextlib.suppress(BrokenPipeError), self.warm:  # closes its pipes, and waits
                self.warm.kill()
            self.warm = None
            adopt_orphans(False)

    def _answer(self) -> str:
        """The next line that the warm process says; empty where it has ended."""
        assert self.warm
        assert self.warm.stdout
        return self.warm.stdout.readline().strip()


class Adopted:
    """A child of this process that another one has forked; with what a launcher needs of `subprocess.Popen`."""

    def __init__(self, pid: int):
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        return self._wait(os.WNOHANG)

    def wait(self) -> int | None:
        return self._wait(0)

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _wait(self, how: int) -> int | None:
        if self.returncode is None:
            try:
                pid, status = os.waitpid(self.pid, how)
            except ChildProcessError:  # SIGCHLD is ignored here; subprocess says the same then
                self.returncode = 0
            else:
                self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def _signal(self, number: signal.Signals) -> None:
        if self.poll() is None:  # until it is waited for, its number is no other's
            os.kill(self.pid, number)


def adopt_orphans(adopt: bool) -> bool:
    """Whether the descendants of this process become its children, from now on, when their parent ends."""
    if sys.platform != "linux":
        return False
    return ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, int(adopt), 0, 0, 0) == 0


def serve(warm_up: Callable[[], Any]) -> None:
    """The warm process: call `warm_up`, which makes the imports, then fork for every request. Returns in each fork,
    which then is as a fresh process for the job whose folder is its argument, and ends by `leave`. The warm process
    ends when its launcher does."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what an import prints is no answer
    warm_up()
    gc.collect()
    gc.freeze()  # no fork has to copy what lies here only for its collector to look at it
    if why := why_not_fork():
        print(why, file=answers)
        leave(0)
    print(READY, file=answers)
    while line := sys.stdin.readline():
        request = json.loads(line)
        pid = fork()
        if pid == 0:
            answers.close()
            become(Path(request["folder"]), request["environment"])
            return
        print(pid, file=answers)
    leave(0)


def why_not_fork() -> str:
    """Why a fork of this process could not compute; "" where it could."""
    pid = os.fork()
    if pid == 0:
        torch = sys.modules.get("torch")
        os._exit(int(torch is not None and torch.cuda._is_in_bad_fork()))
    _, status = os.waitpid(pid, 0)
    if status:
        return "an import has begun to use the GPU"
    # Only now: libraries that are made for it, such as numpy's OpenBLAS, end their threads before a fork.
    threads = len(list(Path("/proc/self/task").iterdir())) - 1
    return f"{threads} threads run after the imports, which a fork would lack" if threads else ""


def fork() -> int:
    """Fork a process whose parent is not this one but the nearest that adopts orphans. Returns its pid, and 0 in it."""
    reader, writer = os.pipe()
    between = os.fork()
    if between == 0:
        pid = os.fork()
        if pid:
            os.write(writer, str(pid).encode())
            os._exit(0)
        os.close(reader)
        os.close(writer)
        return 0
    os.close(writer)
    os.waitpid(between, 0)  # from now on it is an orphan
    pid = int(os.read(reader, 32))
    os.close(reader)
    return pid


def become(folder: Path, changes: dict[str, str | None]) -> None:
    """Make of this fork what a fresh process for the job in `folder` is. `changes` of the environment: None removes."""
    os.setsid()
    log_file = os.open(folder / "log.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, file in ((0, nothing), (1, log_file), (2, log_file)):
        os.dup2(file, number)
    os.close(log_file)
    os.close(nothing)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115  # for the whole process
    for name, value in changes.items():  # all else stays: imports set variables, too
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    sys.argv[1:] = [str(folder)]
    sys.orig_argv[-2:] = [str(folder)]
    if "numpy" in sys.modules:  # Python's own generator gets a new seed in every fork
        sys.modules["numpy"].random.seed()


def leave(code: int) -> NoReturn:
    """End this process as an interpreter ends, with its threads and with what is registered for its exit, but without
    taking all imports apart, which takes as long as the start of a small job."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
