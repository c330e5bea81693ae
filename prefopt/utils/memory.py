"""Too little memory, in words; and how the C library treats freed memory."""

import contextlib
import ctypes
import errno
import sys
from collections.abc import Iterator

from prefopt.errors import OutOfMemory

# What allocators say, where their error is no MemoryError: PyTorch's on a CPU and on a GPU, cuBLAS, C++.
MESSAGES = ("can't allocate memory", "out of memory", "ALLOC_FAILED", "bad_alloc", "bad allocation")
OTHERS = "end other programs on this machine, or take one with more memory"


def keep_freed_memory() -> None:
    """Let glibc keep large freed blocks instead of giving them back to the kernel. Does nothing with another C library.

    A training step on the CPU frees and takes the same gigabytes again and again; the page faults took a fifth of its
    time.
    """
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return
    m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3  # as malloc.h numbers them
    mallopt(m_mmap_threshold, 2**30)
    mallopt(m_trim_threshold, 2**31 - 1)
    mallopt(m_top_pad, 2**28)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator has raised this error, or one that it was made of."""
    seen: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in seen:  # an error raised from itself is its own cause
        if isinstance(link, MemoryError) or type(link).__name__ == "OutOfMemoryError":
            return True
        if isinstance(link, OSError) and link.errno == errno.ENOMEM:
            return True
        if isinstance(link, RuntimeError) and any(text.lower() in str(link).lower() for text in MESSAGES):
            return True
        seen.append(link)
        link = link.__cause__ or link.__context__
    return False


@contextlib.contextmanager
def memory_for(doing: str, *remedies: str) -> Iterator[None]:
    """Convert an out-of-memory error into OutOfMemory, which says that it came up while `doing`, and what to change."""
    try:
        yield
    except OutOfMemory:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        helps = "; or ".join([*remedies, OTHERS])
        raise OutOfMemory(f"out of memory while {doing}. What helps: {helps}. ({first})") from error
