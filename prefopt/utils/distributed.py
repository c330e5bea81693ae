"""The processes that train one policy together, as torchrun or the Slurm script starts them.

They read RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT from the environment. Only rank 0, the main process,
writes files and messages. For a single process all of this does nothing.
"""

import contextlib
import datetime
import faulthandler
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from prefopt.errors import UserError

T = TypeVar("T")
R = TypeVar("R")

# The others wait this long for what one process does alone: tokenizing, converting a model, waiting for another job.
COLLECTIVE_TIMEOUT = datetime.timedelta(hours=12)


def rank() -> int:
    """The number of this process, from 0. Raises UserError where RANK is not a number."""
    return _environment_number("RANK", 0)


def world_size() -> int:
    """How many processes there are. Raises UserError where WORLD_SIZE is not a number."""
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
    """Inside, torch's process group exists. A single process gets one only with `always` (an engine may need it). Where
    there is one already, that one stays.

    `device`: cpu, cuda or cuda:N. With cuda, LOCAL_RANK chooses the GPU of this process.
    """
    from torch import distributed

    if distributed.is_initialized() or (world_size() == 1 and not always):
        yield
        return

    backend = "gloo"
    if device.startswith("cuda"):
        import torch

        backend = "nccl"
        if device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if world_size() == 1:
        # The default store needs MASTER_ADDR and MASTER_PORT, which are not set for a single process.
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
    """Wait until all processes are here.

    The watchdog does not count while a process waits for the main one, which may work for hours and has its own
    watchdog. The main process goes on being watched: it waits for the others only when they hang.
    """
    if world_size() > 1:
        from torch import distributed

        if not is_main_process():
            watchdog.pause()
        distributed.barrier()
        watchdog.reset()


class Watchdog:
    """Ends this process with a traceback on stderr if it makes no progress, so that its launcher stops the others.

    What hangs is mostly one process of a group, for which the others wait without an error. The timer is a thread of
    faulthandler in C: it fires even where Python itself is stuck in a collective.
    """

    def __init__(self) -> None:
        self.timeout_s: float | None = None  # None: off
        self.last_reset = 0.0

    def start(self, timeout_s: float | None) -> None:
        self.timeout_s = timeout_s if world_size() > 1 else None
        self.reset()

    def heartbeat(self) -> None:
        # A reset starts a thread: too slow for every token, and a hundredth of the limit is exact enough.
        if self.timeout_s is not None and time.monotonic() - self.last_reset > self.timeout_s / 100:
            self.reset()

    def reset(self) -> None:
        """Count from now on."""
        self.last_reset = time.monotonic()
        if self.timeout_s is None:
            self.pause()
        else:
            # faulthandler writes to a file descriptor, which a stream put in place of sys.stderr may not have.
            faulthandler.dump_traceback_later(self.timeout_s, exit=True, file=sys.__stderr__ or sys.stderr)

    def pause(self) -> None:
        """Do not count until the next reset."""
        faulthandler.cancel_dump_traceback_later()


watchdog = Watchdog()  # a process has one, since faulthandler has one timer


def start_watchdog(timeout_s: float | None) -> None:
    """Start a watchdog: if `heartbeat()` is not called within `timeout_s` seconds, dump the traceback and exit, so that
    the launcher stops the other ranks. None switches it off. A single process has none."""
    watchdog.start(timeout_s)


def heartbeat() -> None:
    """Tell the watchdog that this process makes progress. Cheap enough to be called for every token."""
    watchdog.heartbeat()


def on_main_process(work: Callable[[], T]) -> T | None:
    """Call `work` on the main process only, while the others wait. Its result there; None on the others."""
    result = work() if is_main_process() else None
    barrier()
    return result


@contextlib.contextmanager
def main_process_first() -> Iterator[None]:
    """The main process runs the block before the others do, who then find on disk what it has made."""
    if not is_main_process():
        barrier()
    yield
    if is_main_process():
        barrier()


def broadcast(value: T) -> T:
    """The `value` that the main process gives, in all processes; the others wait for it as in `barrier`."""
    barrier()
    return all_gather_object(value if is_main_process() else None)[0]


def map_shared(
    work: Callable[[T], R],
    items: Sequence[T],
    size: Callable[[T], int],
    watch: Callable[[Sequence[T]], Iterable[T]] = iter,
) -> list[R]:
    """`work(item)` of all `items`, in their order, in all processes. Each process works on a share of about the same
    sum of sizes, over which it goes by `watch(share)`. Tensors that several processes have found are on the CPU.

    A collective: all processes give the same items. None is cut, so that what is found does not depend on the number
    of processes.
    """
    sizes = [size(item) for item in items]
    loads, owners = [0] * world_size(), [0] * len(items)
    for i in sorted(range(len(items)), key=lambda i: -sizes[i]):  # from large to small, to the least loaded
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += sizes[i]
    share = [item for item, owner in zip(items, owners, strict=True) if owner == rank()]
    found = [iter(values) for values in all_gather_object([work(item) for item in watch(share)])]
    return [next(found[owner]) for owner in owners]


def check_agreement(what: str, values: dict[str, Any]) -> None:
    """Compare `values` with those of the other processes. A collective: all raise the same UserError where any value
    differs from the main process's, which names keys, values and ranks. `what` leads it; values are compared as
    JSON."""
    if world_size() == 1:
        return
    texts = {key: json.dumps(value, sort_keys=True, default=str) for key, value in values.items()}
    first, *others = all_gather_object(texts)
    differences = []
    for key in dict.fromkeys(key for each in (first, *others) for key in each):
        for number, other in enumerate(others, start=1):
            if other.get(key) != first.get(key):
                here, there = first.get(key, "not there"), other.get(key, "not there")
                differences.append(f"{key} is {here} in rank 0 and {there} in rank {number}")
                break
    if differences:
        raise UserError(
            f"the {world_size()} processes of this run {what}: {'; '.join(differences)}. Start all of them with the "
            "same command on the same files."
        )


def all_gather_object(value: Any) -> list[Any]:
    """The `value` of every process, in the order of their ranks, with its tensors on the CPU. A single process gets
    `value` itself, with its tensors where they are."""
    if world_size() == 1:
        return [value]
    import torch
    from torch import distributed

    # torch.save and not pickle alone, so that map_location can bring tensors of another process's GPU to the CPU.
    buffer = io.BytesIO()
    torch.save(value, buffer)
    gathered: list[Any] = [None] * world_size()
    distributed.all_gather_object(gathered, buffer.getvalue())
    # Full unpickling runs code, but only processes of this run are in the group.
    return [torch.load(io.BytesIO(data), map_location="cpu", weights_only=False) for data in gathered]
