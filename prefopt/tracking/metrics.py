"""metrics.jsonl of a run, and whether it is what a checkpoint or a record says of it."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK = 2**20  # bytes that are read at a time


def read_metrics(file: Path) -> Iterator[dict[str, Any]]:
    """The rows {"step", "split", metric: value} of metrics.jsonl, without a last line that a killed process left
    half-written; none without a file."""
    if not file.is_file():
        return
    with file.open() as lines:
        for line in lines:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                break


def metrics_files(folder: Path) -> list[Path]:
    """The metrics.jsonl of the run in `folder`; of an online run those of its stages, in their order."""
    stages = sorted(folder.glob("stage_*"), key=lambda stage: int(stage.name.removeprefix("stage_")))
    files = [folder / "metrics.jsonl", *(file for stage in stages for file in stage.glob("*/metrics.jsonl"))]
    return [file for file in files if file.is_file()]


# How metrics over thirds of the held-out pairs begin, by the gap of their prior rewards: small_gap_accuracy.
GAPS = ("small_gap", "middle_gap", "large_gap")
PER_ITEM = ("samples", "heldout")  # folders of a run's, with what an evaluation knows of each sample and held-out pair


def item_file(folder: Path, kind: str, step: int) -> Path:
    """The file in the run's `folder` with the items (`kind` of PER_ITEM) of the evaluation after `step` steps."""
    return folder / kind / f"step_{step:07d}.jsonl"


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """The metrics of a row that are numbers: what other loggers take of it, and a curve is drawn of."""
    return {key: value for key, value in row.items() if key != "step" and isinstance(value, int | float)}


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
