"""A request to stop. SIGUSR2 (from Slurm, ahead of a time limit or a preemption) and SIGTERM only set a flag.

The loop looks at the flag between two steps, saves, and leaves by `Interrupted`, for which a program's exit code is
EXIT_CODE. A handler that saved by itself would do so in the middle of a step, and of several processes in only some.

Ctrl-C raises KeyboardInterrupt, wherever the main thread is.
"""

import signal
import sys
import threading
from typing import Any

EXIT_CODE = 75  # EX_TEMPFAIL: come again


class StopFlag:
    """Whether this process was asked to stop.

    No threading.Event: its `set` takes a lock, which a second signal would find taken by the handler of the first.
    """

    def __init__(self) -> None:
        self.is_set = False

    def handle_signal(self, *_: Any) -> None:
        self.is_set = True


stop_flag = StopFlag()


def install_handlers() -> None:
    """From now on the two signals set the flag. Only the main thread may call it."""
    for signal_ in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(signal_, stop_flag.handle_signal)


def repeat_lost_interrupts() -> None:
    """From now on a Ctrl-C that comes while Python deletes an object is given once more, a moment later: what is raised
    in a `__del__`, as of a lock that is let go, Python only prints."""
    main = threading.main_thread().ident
    assert main

    def repeat(lost: Any) -> None:
        if lost.exc_type is KeyboardInterrupt:  # not at once: raised in here, it would be lost again
            threading.Timer(0.05, signal.pthread_kill, (main, signal.SIGINT)).start()
        else:
            sys.__unraisablehook__(lost)

    sys.unraisablehook = repeat


def stop_requested() -> bool:
    """Whether any process of the group was asked to stop, or this one where there is no group.

    A collective: every process of the group has to call it, and gets the same answer.
    """
    import torch
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return stop_flag.is_set
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"  # NCCL reduces nothing that lies on the CPU
    flag = torch.tensor(float(stop_flag.is_set), device=device)
    distributed.all_reduce(flag, distributed.ReduceOp.MAX)
    return bool(flag.item())
