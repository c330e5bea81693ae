"""The terminal: messages and progress on stderr, tables on stdout."""

import logging
import os
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from rich.console import Console, Group
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from prefopt.utils.distributed import heartbeat, is_main_process
from prefopt.utils.plain import printable

log = logging.getLogger(__name__)
T = TypeVar("T")

LINE_EVERY_S = 10.0
PIPE_WIDTH = 240  # characters: no table of ours is wider
SHORT_CELL, SHORT_WORD = 10, 24  # characters up to which a cell of a table, and one of a single word, is not folded


class PlainConsole(Console):
    """rich's console, on which text is text: [red] is no colour, :bug: no picture, and an escape in a label or a path
    cannot steer the terminal."""

    def __init__(self, **settings: Any):
        super().__init__(markup=False, emoji=False, **settings)

    def _render_buffer(self, buffer: Iterable[Segment]) -> str:
        return super()._render_buffer(s if s.control else Segment(printable(s.text), s.style) for s in buffer)


class LiveDisplay:
    """The one live display that a terminal has room for. Bars may be nested: the open ones share it."""

    def __init__(self) -> None:
        self.progress: Progress | None = None
        self.open_bars = 0

    def open_bar(self, description: str, total: int, done: int) -> TaskID:
        if self.progress is None:
            what = TextColumn("{task.description}", markup=False)
            columns = (what, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            left = (TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}", markup=False))
            self.progress = Progress(*columns, *left, console=PlainConsole(stderr=True), transient=True)
            self.progress.start()
        self.open_bars += 1
        return self.progress.add_task(description, total=total, completed=done, note="")

    def update_bar(self, task: TaskID, done: int, note: str) -> None:
        if self.progress:
            self.progress.update(task, completed=done, note=note)

    def close_bar(self, task: TaskID) -> None:
        if self.progress:
            self.progress.remove_task(task)
            self.open_bars -= 1
            if self.open_bars == 0:
                self.progress.stop()
                self.progress = None


live = LiveDisplay()


def echo(line: str) -> None:
    """Print a line on stderr, above the bars where there are any."""
    # Through the display's console: it moves the bars out of the way.
    console = live.progress.console if live.progress else PlainConsole(stderr=True)
    console.print(line, highlight=False, soft_wrap=True)


class ConsoleHandler(logging.Handler):
    """Log records as lines on stderr: on a terminal the message alone, elsewhere (log.txt) with time and level."""

    def emit(self, record: logging.LogRecord) -> None:
        message = self.format(record)
        if not sys.stderr.isatty():
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
            message = f"{when} {record.levelname} {message}"
        elif record.levelno >= logging.WARNING:
            message = f"{record.levelname.lower()}: {message.lstrip()}"
        echo(message)


def configure_logging() -> None:
    """Send the messages of prefopt's loggers to stderr. Of several processes the main one alone says what is no
    error. May be called again."""
    handler = ConsoleHandler()
    handler.addFilter(lambda record: is_main_process() or record.levelno >= logging.ERROR)
    logger = logging.getLogger("prefopt")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False  # Hydra's root logger would print them again


def log_wrapped(logger: logging.Logger, text: str) -> None:
    """Log `text`, indented, in lines that fit 80 columns."""
    wrap = textwrap.TextWrapper(80, "  ", "    ", break_long_words=False, break_on_hyphens=False)  # a path stays whole
    for line in wrap.wrap(text):
        logger.info(line)


class Bar:
    """The progress of one piece of work of `total` steps, of which `done` are done already.

    Use it as a context manager, and call `advance` after every `by` steps. On a terminal it is a bar. Elsewhere it is a
    line every LINE_EVERY_S seconds. With show=False it is nothing, but the watchdog still gets its heartbeats.
    """

    def __init__(self, description: str, total: int, show: bool = True, done: int = 0):
        self.description, self.total, self.done = description, total, done
        self.done_before = done
        self.start = self.last_line = time.monotonic()
        self.is_live = show and sys.stderr.isatty() and is_main_process()
        self.prints_lines = show and not self.is_live

    def __enter__(self) -> "Bar":
        if self.is_live:
            self.task = live.open_bar(self.description, self.total, self.done)
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_live:
            live.close_bar(self.task)

    def advance(self, note: str = "", by: int = 1) -> None:
        heartbeat()
        self.done += by
        now = time.monotonic()
        if self.is_live:
            live.update_bar(self.task, self.done, note)
        elif self.prints_lines and now - self.last_line >= LINE_EVERY_S:
            self.last_line = now
            # What was done before this process began tells nothing of its speed.
            left_s = (now - self.start) / (self.done - self.done_before) * (self.total - self.done)
            log.info(f"  {self.description} {self.done}/{self.total}, {left_s:.0f} s left  {note}".rstrip())


def progress(items: Sequence[T], description: str, show: bool = True) -> Iterator[T]:
    """Iterate over `items` with a `Bar`."""
    with Bar(description, len(items), show) as bar:
        for item in items:
            yield item
            bar.advance()


def console() -> Console:
    """The console for tables on stdout: as wide as COLUMNS or the terminal, and in a pipe or a file wide enough for a
    whole table."""
    return PlainConsole(width=None if os.isatty(1) or os.environ.get("COLUMNS") else PIPE_WIDTH)


def folding_table(*headings: str, title: str | None = None) -> Table:
    """A table whose cells go on in the next line where the terminal is too narrow, and are never cut."""
    table = Table(title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def rows_table(headings: Sequence[str], rows: Sequence[Sequence[str]], title: str = "", caption: str = "") -> Group:
    """A table under a heading. A column with one value in all rows is named in the heading, an empty one left out.

    Where the table is wider than the console, the parts that all names of a column share (objective-MODEL-DATA-id) go
    into the heading too. What still does not fit goes on in the next line of its cell.
    """
    heading_lines = [title] if title else []
    columns: list[tuple[str, list[str]]] = []  # heading, cells
    for i, heading in enumerate(headings):
        cells = [row[i] for row in rows]
        if len(rows) > 1 and len(set(cells)) == 1:
            if cells[0] not in ("", "–"):
                heading_lines.append(f"{heading}: {cells[0]}")
        elif not rows or set(cells) != {""}:
            columns.append((heading, cells))

    width = console().width
    if _table_width(columns) > width:
        if len(rows) == 1:  # the first column is the name of the row
            heading, cells = columns.pop(0)
            heading_lines.append(f"{heading}: {cells[0]}")
        for i, (heading, cells) in enumerate(columns):
            shortened, common = without_common(cells)
            if common:
                columns[i] = (heading, shortened)
                heading_lines.append(f"{heading}: … is {common}")

    # Short columns are not folded, as long as SHORT_WORD characters are left for each of the others.
    unfolded = [_stays_whole(heading, cells) for heading, cells in columns]
    least = [column if whole else ("", " " * SHORT_WORD) for column, whole in zip(columns, unfolded, strict=True)]
    fits = _table_width(least) <= width
    table = Table()
    for (heading, _), whole in zip(columns, unfolded, strict=True):
        table.add_column(heading, overflow="fold", no_wrap=whole and fits)
    for row in zip(*(cells for _, cells in columns), strict=True):
        table.add_row(*map(Text, row))
    return Group(*map(Text, heading_lines), table, *([Text(caption)] if caption else []))


def without_common(names: Sequence[str]) -> tuple[list[str], str]:
    """Replace by … the parts between hyphens that all names have at the same place, counted from the last.

    Returns the shortened names and the common parts. Where there are none, or a name has a blank, the names as they are
    and "".
    """
    parts = [name.split("-") for name in names]
    shortest = min(map(len, parts), default=0)
    # Places from the end: the last part, an id, stays, since it tells the names apart.
    common_places = [i for i in range(2, shortest + 1) if len({name[-i] for name in parts}) == 1]
    # Of several stretches of common parts, the one nearest to the end.
    stretch = [i for i in common_places if all(j in common_places for j in range(common_places[0], i))]
    if len(names) < 2 or not stretch or any(" " in name for name in names):
        return list(names), ""
    first, last = -stretch[-1], -stretch[0]
    common = "-".join(parts[0][first : last + 1])
    return ["-".join([*name[:first], "…", *name[last + 1 :]]) for name in parts], common


def _stays_whole(heading: str, cells: Sequence[str]) -> bool:
    """Whether a column is so short that none of its cells is to be folded."""
    texts = [heading, *cells]
    longest = max(map(len, texts))
    return longest <= SHORT_CELL or (longest <= SHORT_WORD and not any(" " in text for text in texts))


def _table_width(columns: Sequence[tuple[str, Sequence[str]]]) -> int:
    """The characters in a line of a table with these (heading, cells) in which no cell is folded."""
    return sum(max(map(len, [heading, *cells])) + 3 for heading, cells in columns) + 1  # two blanks and a rule each
