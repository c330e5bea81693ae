"""Being asked to stop. SIGUSR2 (Slurm, ahead of a time limit or a preemption) and SIGTERM set a flag; the loop looks at
it between two steps, saves, and leaves by `Interrupted`, for which a program's exit code is EXIT_CODE.

A handler that saved by itself would do so in the middle of a step, and with several processes in only some of them.
"""

import signal
from typing import Any

EXIT_CODE = 75  # EX_TEMPFAIL: come again
_stop_requested = False


def install_handlers() -> None:
    """From now on the two signals set the flag. Only the main thread may call it."""
    for signal_ in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(signal_, _handle_signal)


def stop_requested() -> bool:
    """Whether this process, or any other that trains the same policy, was asked to stop: the same answer in all."""
    import torch
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return _stop_requested
    flag = torch.tensor(float(_stop_requested), device="cuda" if distributed.get_backend() == "nccl" else "cpu")
    distributed.all_reduce(flag, distributed.ReduceOp.MAX)
    return bool(flag.item())


def _handle_signal(*_: Any) -> None:
    global _stop_requested
    _stop_requested = True
