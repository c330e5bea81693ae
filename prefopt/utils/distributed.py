"""The processes that train one policy together, as torchrun and the Slurm script start them. Alone, all of it is free.

RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are in the environment. Rank 0 writes and talks, the others do
neither.
"""

import contextlib
import datetime
import faulthandler
import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from prefopt.errors import UserError

T = TypeVar("T")

# What one process may do while the others wait: making the reference cache, drawing samples, converting a model.
COLLECTIVE_TIMEOUT = datetime.timedelta(hours=12)


def rank() -> int:
    return _environment_number("RANK", 0)


def world_size() -> int:
    return _environment_number("WORLD_SIZE", 1)


def _environment_number(variable: str, default: int) -> int:
    text = os.environ.get(variable, str(default))
    if not text.isdecimal():
        raise UserError(
            f"the environment variable {variable} must be a number, is {text!r}: unset it, or use torchrun."
        )
    return int(text)


def is_main_process() -> bool:
    return rank() == 0


@contextlib.contextmanager
def process_group(device: str, always: bool = False) -> Iterator[None]:
    """Inside, the processes can reach each other. One alone needs it only where `always` is set."""
    from torch import distributed

    if world_size() == 1 and not always:
        yield
        return
    backend = "gloo"
    if device.startswith("cuda"):
        import torch

        backend = "nccl"
        if device == "cuda":  # from now on the one of this process
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if world_size() == 1:  # nobody else will call
        distributed.init_process_group(
            backend, store=distributed.HashStore(), rank=0, world_size=1, timeout=COLLECTIVE_TIMEOUT
        )
    else:
        distributed.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def barrier() -> None:
    """Until all are here. The others may wait for what the first one does as long as that gets on, which is watched in
    itself; nobody lets the first one wait."""
    if world_size() > 1:
        from torch import distributed

        if not is_main_process():
            faulthandler.cancel_dump_traceback_later()
        distributed.barrier()
        _reset_watchdog()


_timeout_s: float | None = None
_last_heartbeat = 0.0


def start_watchdog(limit_s: float | None) -> None:
    """Start a watchdog: if `heartbeat()` is not called within `limit_s` seconds, dump the traceback and exit, so that
    the launcher stops the other ranks. None disables it; so does a single process.

    What hangs is mostly one process, and all the others wait for it without an error; each says where it is.
    """
    global _timeout_s
    _timeout_s = limit_s if world_size() > 1 else None
    _reset_watchdog()


def heartbeat() -> None:
    """This process has got on. Cheap enough for every token."""
    if _timeout_s is not None and time.monotonic() - _last_heartbeat > _timeout_s / 100:
        _reset_watchdog()


def _reset_watchdog() -> None:
    global _last_heartbeat
    _last_heartbeat = time.monotonic()
    if _timeout_s is None:
        faulthandler.cancel_dump_traceback_later()
    else:
        faulthandler.dump_traceback_later(_timeout_s, exit=True, file=sys.__stderr__ or sys.stderr)


def on_main_process(work: Callable[[], T]) -> T | None:
    """What `work` gives in the first process, while the others wait; None in those."""
    found = work() if is_main_process() else None
    barrier()
    return found


@contextlib.contextmanager
def main_process_first() -> Iterator[None]:
    """The first process goes through it before the others, who then find on disk what it has made."""
    if not is_main_process():
        barrier()
    yield
    if is_main_process():
        barrier()


def all_gather_object(value: Any) -> list[Any]:
    """`value` of every process, in their order, with its tensors on the CPU. Alone: `value` itself."""
    if world_size() == 1:
        return [value]
    import torch
    from torch import distributed

    buffer = io.BytesIO()
    torch.save(value, buffer)
    found: list[Any] = [None] * world_size()
    distributed.all_gather_object(found, buffer.getvalue())
    # Only processes of this run are in the group.
    return [torch.load(io.BytesIO(data), map_location="cpu", weights_only=False) for data in found]
