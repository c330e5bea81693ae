"""What a person sees while something runs: bars on a terminal, a line now and then elsewhere, and plain messages."""

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from prefopt.ranks import is_first, pulse

T = TypeVar("T")
LINE_EVERY_S = 10.0


def say(message: str) -> None:
    """Print a message on stderr, above the bars where there are any; of several processes only the first one does."""
    if not is_first():
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
        self.live = show and sys.stderr.isatty() and is_first()
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
        pulse()
        self.done += by
        now = time.monotonic()
        if self.live and _Live.progress:
            _Live.progress.update(self.task, completed=self.done, note=note)
        elif self.lines and now - self.last_line >= LINE_EVERY_S:
            self.last_line = now
            left = (now - self.start) / (self.done - self.first) * (self.total - self.done)
            say(f"  {self.description} {self.done}/{self.total}, {left:.0f} s left  {note}".rstrip())


def track(items: Sequence[T], description: str, show: bool = True) -> Iterator[T]:
    """Iterate with a bar."""
    with Bar(description, len(items), show) as bar:
        for item in items:
            yield item
            bar.advance()
