"""What a lock promises beside keeping others out: tests/integration/test_faults.py has two programs and one run."""

import subprocess
import sys
import threading

import pytest

from prefopt.errors import UserError
from prefopt.tracking.process import acquire_lock, owns_lock, release_lock
from prefopt.utils.locks import try_lock
from tests.helpers.tiny import ENVIRONMENT, ROOT

# It takes the lock, leaves a forked child and a program that outlive it, and waits to be killed.
HOLDER = """
import os, subprocess, sys, time
from pathlib import Path
from prefopt.tracking.process import acquire_lock, owns_lock
acquire_lock(Path(sys.argv[1]))
child = os.fork()
if child == 0:
    os.write(1, f"{owns_lock(Path(sys.argv[1]))}\\n".encode())  # at once: the two write into one pipe
    time.sleep(600)
program = subprocess.Popen(["sleep", "600"], stdout=subprocess.DEVNULL)
os.write(1, f"{child} {program.pid}\\n".encode())
time.sleep(600)
"""


def test_the_lock_of_a_killed_process_is_free_though_its_children_live(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    holder = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    lines = sorted(holder.stdout.readline().split() for _ in range(2))
    children, answer = lines
    try:
        assert answer == ["False"]  # the forked child does not hold it
        with pytest.raises(UserError, match=f"is held by process {holder.pid} on .* since 20"):
            acquire_lock(tmp_path)
        holder.kill()
        holder.wait()
        acquire_lock(tmp_path)
        release_lock(tmp_path)
    finally:
        holder.kill()
        subprocess.run(["kill", "-9", *children], check=True)  # fails where one has ended: they did live


def test_a_lock_belongs_to_all_threads_of_its_process(tmp_path):
    acquire_lock(tmp_path)
    seen = []

    def thread() -> None:
        acquire_lock(tmp_path)
        seen.append(owns_lock(tmp_path))
        release_lock(tmp_path)

    worker = threading.Thread(target=thread)
    worker.start()
    worker.join()
    assert seen == [True]
    assert not owns_lock(tmp_path)
    lock = try_lock(tmp_path / "lock")
    assert lock is not None
    lock.release()


def test_a_folder_that_cannot_be_made_is_the_systems_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        acquire_lock(tmp_path / "file" / "run")
