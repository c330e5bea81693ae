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
PATIENCE = datetime.timedelta(hours=12)


def rank() -> int:
    return _number("RANK", 0)


def world_size() -> int:
    return _number("WORLD_SIZE", 1)


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable, str(default))
    if not text.isdecimal():
        raise UserError(
            f"the environment variable {variable} must be a number, is {text!r}: unset it, or use torchrun."
        )
    return int(text)


def is_first() -> bool:
    return rank() == 0


@contextlib.contextmanager
def together(device: str, always: bool = False) -> Iterator[None]:
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
        distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1, timeout=PATIENCE)
    else:
        distributed.init_process_group(backend, timeout=PATIENCE)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def wait() -> None:
    """Until all are here. The others may wait for what the first one does as long as that gets on, which is watched in
    itself; nobody lets the first one wait."""
    if world_size() > 1:
        from torch import distributed

        if not is_first():
            faulthandler.cancel_dump_traceback_later()
        distributed.barrier()
        _set_alarm()


_limit_s: float | None = None
_set_at = 0.0


def watch(limit_s: float | None) -> None:
    """Of several processes: from now on this one gets on (`pulse`) within so many seconds, or it writes on stderr where
    it stands and ends, by which its launcher ends the others. None: never mind.

    What hangs is mostly one process, and all the others wait for it without an error; each says where it is.
    """
    global _limit_s
    _limit_s = limit_s if world_size() > 1 else None
    _set_alarm()


def pulse() -> None:
    """This process has got on. Cheap enough for every token."""
    if _limit_s is not None and time.monotonic() - _set_at > _limit_s / 100:
        _set_alarm()


def _set_alarm() -> None:
    global _set_at
    _set_at = time.monotonic()
    if _limit_s is None:
        faulthandler.cancel_dump_traceback_later()
    else:
        faulthandler.dump_traceback_later(_limit_s, exit=True, file=sys.__stderr__ or sys.stderr)


def by_first(work: Callable[[], T]) -> T | None:
    """What `work` gives in the first process, while the others wait; None in those."""
    found = work() if is_first() else None
    wait()
    return found


@contextlib.contextmanager
def first_alone() -> Iterator[None]:
    """The first process goes through it before the others, who then find on disk what it has made."""
    if not is_first():
        wait()
    yield
    if is_first():
        wait()


def gather(value: Any) -> list[Any]:
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
