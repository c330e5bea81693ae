"""The file that keeps a judge's preferences: a JSON array as alpaca-eval writes it, with a row on a line, each sealed
(`utils/store.py`). They were paid for: where the file is damaged, the rows that are whole are kept."""

import logging
from pathlib import Path
from typing import Any

from prefopt.utils.files import atomic_write
from prefopt.utils.redact import redact_values
from prefopt.utils.store import format_sealed_array, read_sealed_lines

log = logging.getLogger(__name__)


def write_annotations(file: Path, rows: list[dict[str, Any]]) -> None:
    """Replace the file in one step. Secrets are redacted: a server's answer may repeat the key that it was sent."""
    atomic_write(file, format_sealed_array(redact_values(rows)))


def known_preferences(file: Path) -> set[tuple[str, str, str]]:
    """(question, answer, answer) of the rows of the file that have a preference. Leaves the file as it is."""
    rows, _ = read_sealed_lines(file)
    return {(row["instruction"], row["output_1"], row["output_2"]) for row in rows if is_preference(row["preference"])}


def prune_annotations(file: Path) -> None:
    """Remove the rows without a preference, and damaged ones, from the file. alpaca-eval takes every row in it for
    answered, and would not ask about it again."""
    if not file.is_file():
        return
    rows, whole = read_sealed_lines(file)
    kept = [row for row in rows if is_preference(row["preference"])]
    if not whole:
        log.warning(f"  {file} is damaged: {len(kept)} of its preferences are whole. The others are asked for again.")
    if not kept:
        file.unlink()
    elif not whole or len(kept) < len(rows):
        write_annotations(file, kept)


def is_preference(value: Any) -> bool:
    """Whether it is a number from 1 to 2. False for NaN too."""
    return value is not None and 1 <= value <= 2
