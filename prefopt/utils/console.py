"""What a person sees while something runs: bars on a terminal, a line now and then elsewhere, and plain messages."""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from prefopt.utils.distributed import heartbeat, is_main_process

T = TypeVar("T")

LINE_EVERY_S = 10.0
SHORT_CELL, SHORT_WORD = 10, 24  # characters up to which a table's cell, and one word in it, is never broken


def say(message: str) -> None:
    """Print a message on stderr, above the bars where there are any; of several processes only the first one does."""
    if not is_main_process():
        return
    console = _Live.progress.console if _Live.progress else Console(stderr=True)
    console.print(message, markup=False, highlight=False, soft_wrap=True)


class _Live:
    """Bars may nest, but a terminal has room for one live display: the open bars share it."""

    progress: Progress | None = None
    open_bars = 0


class Bar:
    """`total` steps of one piece of work. Use it as a context manager and call `advance` after every `by` of them."""

    def __init__(self, description: str, total: int, show: bool = True, done: int = 0):
        self.description, self.total, self.done, self.first = description, total, done, done
        self.start = self.last_line = time.monotonic()
        self.live = show and sys.stderr.isatty() and is_main_process()
        self.lines = show and not self.live

    def __enter__(self) -> "Bar":
        if self.live:
            if _Live.progress is None:
                columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
                left = (TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
                _Live.progress = Progress(*columns, *left, console=Console(stderr=True), transient=True)
                _Live.progress.start()
            _Live.open_bars += 1
            self.task = _Live.progress.add_task(self.description, total=self.total, completed=self.done, note="")
        return self

    def __exit__(self, *_: object) -> None:
        if self.live and _Live.progress:
            _Live.progress.remove_task(self.task)
            _Live.open_bars -= 1
            if _Live.open_bars == 0:
                _Live.progress.stop()
                _Live.progress = None

    def advance(self, note: str = "", by: int = 1) -> None:
        heartbeat()
        self.done += by
        now = time.monotonic()
        if self.live and _Live.progress:
            _Live.progress.update(self.task, completed=self.done, note=note)
        elif self.lines and now - self.last_line >= LINE_EVERY_S:
            self.last_line = now
            left = (now - self.start) / (self.done - self.first) * (self.total - self.done)
            say(f"  {self.description} {self.done}/{self.total}, {left:.0f} s left  {note}".rstrip())


def progress(items: Sequence[T], description: str, show: bool = True) -> Iterator[T]:
    """Iterate with a bar."""
    with Bar(description, len(items), show) as bar:
        for item in items:
            yield item
            bar.advance()


def console() -> Console:
    """As wide as the terminal, or as COLUMNS says; where the output is neither, wide enough for a whole table."""
    return Console(width=None if os.isatty(1) or os.environ.get("COLUMNS") else 240)


def rows_table(headings: Sequence[str], rows: Sequence[Sequence[str]], title: str = "", caption: str = "") -> Group:
    """A table under a heading; a column that is the same in all rows stands in the heading, an empty one nowhere.

    Where the table is wider than the console, the parts that names have in common (objective-MODEL-DATA-id) stand there
    too. What still does not fit goes on in the next line of its cell.
    """
    columns = [[row[i] for row in rows] for i in range(len(headings))]
    kept: list[tuple[str, list[str]]] = []
    above = [title] if title else []
    for heading, cells in zip(headings, columns, strict=True):
        if len(rows) > 1 and len(set(cells)) == 1:
            if cells[0] not in ("", "–"):
                above.append(f"{heading}: {cells[0]}")
        elif not rows or set(cells) != {""}:
            kept.append((heading, cells))
    if _width(kept) > console().width:
        if len(rows) == 1:  # which row it is
            heading, cells = kept.pop(0)
            above.append(f"{heading}: {cells[0]}")
        for i, (heading, cells) in enumerate(kept):
            shorter, common = without_common(cells)
            if common:
                kept[i] = (heading, shorter)
                above.append(f"{heading}: … is {common}")
    whole = [_stays_whole(heading, cells) for heading, cells in kept]
    least = _width(
        [column if is_whole else ("", " " * SHORT_WORD) for column, is_whole in zip(kept, whole, strict=True)]
    )
    table = Table()
    for (heading, _), is_whole in zip(kept, whole, strict=True):  # where there is no room for that, all are broken
        table.add_column(heading, overflow="fold", no_wrap=is_whole and least <= console().width)
    for row in zip(*(cells for _, cells in kept), strict=True):
        table.add_row(*map(Text, row))
    return Group(*map(Text, above), table, *([Text(caption)] if caption else []))


def without_common(names: Sequence[str]) -> tuple[list[str], str]:
    """The names with … for the parts between hyphens that all of them have at the same place, counted from the last;
    and these parts. The names themselves and "" where there are none, or a blank is in one."""
    parts = [name.split("-") for name in names]
    least = min(map(len, parts), default=0)
    same = [i for i in range(2, least + 1) if len({each[-i] for each in parts}) == 1]
    run = [i for i in same if all(j in same for j in range(same[0], i))]
    if len(names) < 2 or not run or any(" " in name for name in names):
        return list(names), ""
    first, last = -run[-1], -run[0]
    common = "-".join(parts[0][first : last + 1])
    return ["-".join([*each[:first], "…", *each[last + 1 :]]) for each in parts], common


def _stays_whole(heading: str, cells: Sequence[str]) -> bool:
    longest = max(map(len, [heading, *cells]))
    return longest <= SHORT_CELL or (longest <= SHORT_WORD and not any(" " in text for text in [heading, *cells]))


def _width(columns: Sequence[tuple[str, Sequence[str]]]) -> int:
    """Of a table with nothing broken into lines."""
    return sum(max(map(len, [heading, *cells])) + 3 for heading, cells in columns) + 1
