"""metrics.jsonl of a run, and whether it is what a checkpoint or a record says of it."""

import hashlib
from pathlib import Path
from typing import Any

BLOCK = 2**20  # bytes that are read at a time


def metrics_damage(file: Path, vouched: dict[str, Any]) -> str | None:
    """How the beginning of `file` differs from its `length` in bytes and its `sha256` in `vouched`; None where it does
    not. What a killed process wrote behind it does not count."""
    length = vouched["length"]
    if not file.is_file():
        return f"its metrics, {file}, are gone"
    if file.stat().st_size < length:
        return f"its metrics, {file}, have {file.stat().st_size} bytes, and should have {length}"
    if digest_of_beginning(file, length).hexdigest() != vouched["sha256"]:
        return f"its metrics, the first {length} bytes of {file}, have another checksum than was written"
    return None


def digest_of_beginning(file: Path, length: int) -> "hashlib._Hash":
    """The SHA-256 of the first `length` bytes of `file`, to be updated with what comes after them."""
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while length and (block := content.read(min(BLOCK, length))):
            digest.update(block)
            length -= len(block)
    return digest
