"""Run a command for as long as the process that asked for it lives.

    python guard.py SECONDS COMMAND...

The other end of stdin is with that process, so that it is closed however that process ends, by SIGKILL too. Then, and
at SIGTERM, all processes of the command's group are asked to end, and are killed after SECONDS. The exit code is that
of the command. It imports nothing of prefopt: the command belongs to another environment.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time

POLL_S = 0.1


def main(seconds: float, command: list[str]) -> int:
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    # Slurm asks every process of a job to leave by it. The job decides when its server ends; the command inherits this.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", flush=True)
        return 127
    while child.poll() is None and not asked:
        if select.select([0], [], [], POLL_S)[0] and not os.read(0, 1):
            break
    with contextlib.suppress(ProcessLookupError):  # nothing is left of the group
        os.killpg(child.pid, signal.SIGTERM)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            child.poll()
            os.killpg(child.pid, 0)
            time.sleep(POLL_S)
        os.killpg(child.pid, signal.SIGKILL)
    code = child.wait()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
