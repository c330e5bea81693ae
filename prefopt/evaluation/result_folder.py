"""The folder of a result: record.json, which is written last, and the files that tell of its items."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from prefopt.evaluation.cost import Budget, Estimate
from prefopt.tracking.provenance import provenance
from prefopt.tracking.record import find_result, write_result
from prefopt.utils.locks import locked
from prefopt.utils.store import read_sealed_lines

log = logging.getLogger(__name__)


def make_once(
    folder: Path,
    what: str,
    is_complete: Callable[[Path], bool],
    make: Callable[[Path], dict[str, Any]],
    extra: dict[str, str],
) -> Path:
    """The folder of a result. Nothing is computed where `is_complete(folder)`. Other processes wait while one makes it;
    `what` says to them what that is.

    `make(folder)` writes the other files, and returns the record. What it took, where it was made, and `extra` go into
    the record too.
    """
    with locked(folder.with_name(f"{folder.name}.lock"), what):
        if not is_complete(folder):
            start = time.monotonic()
            record = make(folder)
            # Last: where the record exists, the result is complete.
            write_result(folder / "record.json", record | {"seconds": time.monotonic() - start} | provenance() | extra)
    return folder


def has_record(folder: Path) -> bool:
    """Whether the folder has a record. A damaged one is none, which the log says."""
    return find_result(folder / "record.json") is not None


def has_rows(name: str, key: str) -> Callable[[Path], bool]:
    """A test whether a folder has a record, and in the sealed file `name` as many rows as its figure `key` says. A
    damaged file has not, which the log says."""

    def is_complete(folder: Path) -> bool:
        record = find_result(folder / "record.json")
        if record is None:
            return False
        rows, whole = read_sealed_lines(folder / name)
        if not whole or len(rows) != record["figures"][key]:
            log.warning(f"  {folder / name} is damaged. It is made anew.")
            return False
        return True

    return is_complete


class JudgedResult(Protocol):
    """A result of answers and of what a judge says of them. The answers are drawn or read once, when they are first
    asked for."""

    def is_complete(self) -> bool: ...

    def check(self) -> None:
        """Raise UserError for a model that cannot answer. Reads no weights."""

    def estimate(self) -> Estimate:
        """The judge's calls that it needs. Draws the answers."""

    def make(self, budget: Budget, extra: dict[str, str]) -> Path:
        """The result's folder. `extra` goes into the record. Raises UserError where the judge does."""


R = TypeVar("R", bound=JudgedResult)


def make_all(results: Sequence[R], max_cost: float, extra: dict[str, str]) -> Iterator[tuple[R, Path]]:
    """Make every result that is not complete, and yield each with its folder. `extra` goes into the records.

    The judge is not asked before everything else is there: all answers, and an estimate of all calls. Raises UserError
    for what is missing, and where the estimate is above `max_cost` USD.
    """
    pending = [result for result in results if not result.is_complete()]
    for result in pending:
        result.check()
    budget = Budget(max_cost)
    budget.announce_all([result.estimate() for result in pending])
    for result in results:
        yield result, result.make(budget, extra)
