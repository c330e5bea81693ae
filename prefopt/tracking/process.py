"""Which process works on a run, and whether it is still alive. The record alone cannot say: a killed process writes
nothing."""

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock

from prefopt.errors import UserError
from prefopt.tracking.heartbeat import Heartbeat
from prefopt.utils.distributed import is_main_process
from prefopt.utils.locks import remove_and_release, try_lock

STATES = ["new", "queued", "running", "requeued", "interrupted", "finished", "failed", "died", "damaged", "unknown"]
ACTIVE_STATES = ("queued", "running", "requeued")  # and perhaps "unknown"
# Slurm's states in which a job has ended.
TERMINAL_SLURM_STATES = {
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "DEADLINE",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "NODE_FAIL",
    "BOOT_FAIL",
}


def process_info() -> dict[str, Any]:
    """The keys of a record by which `resolve_status` recognizes this process.

    `slurm_job` is JOB_TASK where launcher=slurm started it. A Slurm job that a person wrote does not count: it may
    outlive the process that runs in it.
    """
    job = os.environ.get("PREFOPT_SLURM_JOB")
    born = process_start_time(os.getpid())
    return {"host": socket.gethostname(), "pid": os.getpid(), "pid_born": born, "slurm_job": job, "since": utc_now()}


def describe_owner(record: dict[str, Any]) -> str:
    """The process that a record names, in words."""
    place = f"Slurm job {record['slurm_job']}" if record.get("slurm_job") else f"process {record.get('pid')}"
    return f"{place} on {record.get('host')} since {record.get('since')}"


def utc_now() -> str:
    """Date and time in UTC, as records have them."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


# By the run's folder; a lock is released when nothing refers to it.
_locks: dict[Path, tuple[filelock.BaseFileLock, Heartbeat]] = {}


def acquire_lock(folder: Path) -> None:
    """Make this process the only one that works on the run in `folder`, until `release_lock` or its end.

    The lock is of the whole process, whatever its thread. May be called again. Hosts that the lock does not reach know
    the process by its heartbeat.

    Raises UserError that says who holds it, and OSError where `folder` cannot be written.
    """
    if owns_lock(folder):
        return
    lock = _take(folder / "lock", folder)
    heartbeat = Heartbeat(folder, describe_owner(process_info()))
    try:
        heartbeat.begin()
    except BaseException:
        lock.release()
        raise
    _locks[folder.resolve()] = lock, heartbeat


def _take(file: Path, what: Path) -> filelock.BaseFileLock:
    """The lock in `file`, acquired, with this process as its owner; of `what` in messages."""
    lock = try_lock(file)
    if lock is None:
        owner = file.read_text() or "another process"  # one that has not written its name yet
        raise UserError(f"{what} is held by {owner}. Wait for it, or stop it.")
    file.write_text(describe_owner(process_info()))
    return lock


@contextlib.contextmanager
def output_lock(output: Path) -> Iterator[None]:
    """Inside, this process is the only one that makes the file `output`. Of a group, the main process has the lock.

    Raises UserError that says who else does, and OSError where nothing can be written there.
    """
    if not is_main_process():
        yield
        return
    file = output.with_name(f"{output.name}.lock")
    lock = _take(file, output)
    try:
        yield
    finally:
        remove_and_release(file, lock)


def owns_lock(folder: Path) -> bool:
    """Whether this process holds it; a forked child of the holder does not."""
    held = _locks.get(folder.resolve())
    return held is not None and held[0].is_locked


def release_lock(folder: Path) -> None:
    """Let other processes work on the run in `folder`. Does nothing where this one does not hold it."""
    if held := _locks.pop(folder.resolve(), None):
        lock, heartbeat = held
        if lock.is_locked:  # not in a forked child
            heartbeat.end()
        lock.release()


def resolve_status(record: dict[str, Any], queue: dict[str, str] | None = None) -> str:
    """The state of a run, one of STATES: the status in its record, unless its process is gone.

    `queue` is that of `slurm_queue`. new, queued, running, finished, failed: as in the record. interrupted: it saved
    and left. requeued: the same, and Slurm will start it again. died: its process ended without writing so. unknown: it
    is on a machine that cannot be asked from here. (damaged: the record cannot be read; see `status.inspect_runs`.)
    """
    status = record["status"]
    if status not in ("queued", "running", "interrupted"):
        return status

    is_here = record.get("host") == socket.gethostname()
    # The number of a process that ended may be another's by now: the start time tells them apart.
    is_gone = is_here and record.get("pid_born") != process_start_time(record.get("pid") or 0)

    if record.get("slurm_job"):
        if queue is None:
            return "unknown"
        slurm = queue.get(record["slurm_job"], "gone")
        if slurm == "gone" or slurm in TERMINAL_SLURM_STATES:
            return status if status == "interrupted" else "died"
        # A job that is preempted or loses its node waits again, with no time to write so.
        if status == "interrupted" or (status == "running" and slurm == "PENDING"):
            return "requeued"
        # While it is queued, the record names its submitter, which may have ended.
        return "died" if status == "running" and is_gone else status

    if status == "interrupted":
        return status
    if not is_here:
        return "unknown" if record.get("host") else "died"
    return "died" if is_gone else status


def slurm_queue() -> dict[str, str] | None:
    """{"JOB_TASK": state such as PENDING} of this user's jobs, with those that ended a short while ago.

    None where Slurm is not installed or does not answer. That tells nothing of the jobs.
    """
    if not shutil.which("squeue"):
        return None
    command = ["squeue", "--noheader", "--array", "--states=all", f"--user={getpass.getuser()}", "--format=%i %T"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (subprocess.SubprocessError, OSError):
        return None
    return dict(line.split() for line in answer.splitlines() if line.strip())


def process_start_time(pid: int) -> str | None:
    """When a process was started, in ticks of the kernel's clock; None for one that has ended.

    With the pid it identifies a process, as long as the machine is not started again.
    """
    try:
        # The second field, the program's name in parentheses, may have blanks and parentheses in it.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    state, start_time = fields[0], fields[19]
    return None if state == "Z" else start_time  # a zombie has ended, and waits for its parent
