"""What disks and kills do to files."""

import os
from pathlib import Path


def flip(file: Path) -> None:
    """One bit in the middle."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def zero(file: Path) -> None:
    """All bytes, as after a power cut."""
    file.write_bytes(bytes(file.stat().st_size))


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def empty(file: Path) -> None:
    os.truncate(file, 0)


HARMS = [flip, zero, cut, empty]
