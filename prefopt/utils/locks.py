"""Locks between processes, as files.

The kernel holds a lock for a process (flock), and releases it when the process ends, however it ends. A child does not
hold its parent's lock on: an executed program does not inherit the file, and filelock closes it in a forked child.
"""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import filelock

from prefopt.utils.distributed import barrier, heartbeat, is_main_process
from prefopt.utils.files import with_filename

log = logging.getLogger(__name__)

HEARTBEAT_S = 10.0  # between two signs of life while this process waits for a lock


def open_lock(file: Path) -> filelock.BaseFileLock:
    """The lock in `file`, not acquired yet; it belongs to the whole process, and not to a thread. Makes its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    # Where a file system has no flock, an error: filelock's substitute outlives a process that is killed.
    return filelock.FileLock(file, thread_local=False, fallback_to_soft=False)


def try_lock(file: Path) -> filelock.BaseFileLock | None:
    """The lock in `file`, acquired; None where another process has it. Raises OSError where it cannot be written."""
    lock = open_lock(file)
    try:
        with with_filename(file):
            lock.acquire(blocking=False)
    except filelock.Timeout:
        return None
    return lock


@contextlib.contextmanager
def locked(file: Path, what: str) -> Iterator[None]:
    """Inside, no other process has the lock in `file`. Waits for it; `what` names it to those who wait.

    Raises OSError where the file cannot be written.
    """
    lock = try_lock(file)
    if lock is None:
        log.info(f"  {what}: another job computes it; waiting")
        lock = open_lock(file)
        with with_filename(file):
            while not lock.is_locked:
                heartbeat()  # who waits for a process that works does not hang
                with contextlib.suppress(filelock.Timeout):
                    lock.acquire(timeout=HEARTBEAT_S)
    try:
        yield
    finally:
        remove_and_release(file, lock)


@contextlib.contextmanager
def locked_by_main(file: Path, what: str) -> Iterator[None]:
    """`locked` for all processes of a run: the main one has the lock, and the others enter when it does."""
    with contextlib.ExitStack() as stack:
        if is_main_process():
            stack.enter_context(locked(file, what))
        barrier()
        yield


def remove_and_release(file: Path, lock: filelock.BaseFileLock) -> None:
    """Release the lock in `file`, and leave no file there.

    It is removed while it is held: whoever has opened it sees that it has no name any more, and opens it again.
    """
    with contextlib.suppress(OSError):
        file.unlink(missing_ok=True)
    lock.release()
