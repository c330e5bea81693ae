"""How the C library treats freed memory."""

import ctypes
import sys


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
