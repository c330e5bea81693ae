"""Runs at work, as `prefopt runs watch=true` shows them: losses, speed, and the time left."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from prefopt.tracking.metrics import metrics_files
from prefopt.tracking.process import ACTIVE_STATES
from prefopt.tracking.record import NUMBER, WHOLE, is_kind
from prefopt.tracking.status import RunStatus, age
from prefopt.utils.console import without_common
from prefopt.utils.files import read_lines_reversed

SPEED_OVER = 10  # last training steps, over which the speed is a mean
UNKNOWN = "–"
FRAME_LINES = 8  # of a terminal, beside the rows: the counts, the head of the table, the line for what has no room


@dataclass
class Progress:
    """How far a run is: None where that is not known (yet). `steps` of an online run are those of all its stages.
    `time` is when its metrics were last written, in seconds since the epoch, and `seconds_left` the time to its end."""

    step: int | None = None
    steps: int | None = None
    train_loss: float | None = None
    heldout_loss: float | None = None
    pairs_per_second: float | None = None
    time: float = 0.0
    seconds_left: float | None = None

    def texts(self) -> dict[str, str]:
        """Step, training loss, held-out loss, pairs a second and time left, by their headings."""
        return {
            "step": f"{UNKNOWN if self.step is None else self.step}/{self.steps or '?'}",
            "loss": _text(self.train_loss, ".4f"),
            "held-out": _text(self.heldout_loss, ".4f"),
            "pairs/s": _text(self.pairs_per_second, ".3g"),
            "left": UNKNOWN if self.seconds_left is None else age(self.seconds_left),
        }


def _text(value: float | None, form: str) -> str:
    return UNKNOWN if value is None else format(value, form)


class Watch:
    """What has been seen of the runs so far. Call `look` again and again, and show `table` or `changes`."""

    def __init__(self) -> None:
        self.runs: list[RunStatus] = []
        self.progress: dict[Path, Progress] = {}
        self.first: dict[Path, Progress] = {}  # since a run is at work: what its time per step is measured from
        self.shown: dict[Path, str] = {}

    def look(self, runs: list[RunStatus]) -> None:
        """Read how far these runs are."""
        self.runs = runs
        for run in runs:
            now = progress_of(run)
            if run.state == "running":
                now.seconds_left = self._seconds_left(run, now)
            else:
                self.first.pop(run.folder, None)
            self.progress[run.folder] = now

    def _seconds_left(self, run: RunStatus, now: Progress) -> float | None:
        """From the time per step since the run is watched, with its evaluations and checkpoints; until it has taken a
        step, from the speed of its last ones, without these."""
        if now.step is None or now.steps is None:
            return None
        first = self.first.setdefault(run.folder, now)
        if first.step is not None and now.step > first.step and now.time > first.time:
            per_step = (now.time - first.time) / (now.step - first.step)
        else:
            batch_size = _number(run.record.get("config", {}), "batch_size")
            if not batch_size or not now.pairs_per_second:
                return None
            per_step = batch_size / now.pairs_per_second
        return per_step * (now.steps - now.step)

    def table(self, lines: int) -> Group:
        """A table of at most so many lines, and 80 columns wide unless names are long. Runs at work come first."""
        counts = Counter(run.state for run in self.runs)
        summary = ", ".join(f"{n} {state}" for state, n in counts.most_common()) or "no runs"
        ordered = sorted(self.runs, key=lambda run: (run.state != "running", run.state not in ACTIVE_STATES))
        names, common = without_common([run.folder.name for run in ordered])
        table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column("run", overflow="fold")
        table.add_column("status", no_wrap=True)
        for heading in Progress().texts():
            table.add_column(heading, justify="right", no_wrap=True)
        room = max(1, lines - FRAME_LINES)
        for run, name in list(zip(ordered, names, strict=True))[:room]:
            table.add_row(*map(Text, [name, run.state, *self.progress[run.folder].texts().values()]))
        notes = [f"run: … is {common}"] if common else []
        more = [f"and {len(ordered) - room} more"] if len(ordered) > room else []
        return Group(Text(summary), *map(Text, notes), table, *map(Text, more))

    def changes(self) -> list[str]:
        """A line for each run whose status or step has changed since the last call."""
        lines = []
        for run in self.runs:
            texts = self.progress[run.folder].texts()
            state_and_step = f"{run.state} {texts['step']}"
            if self.shown.get(run.folder) != state_and_step:
                self.shown[run.folder] = state_and_step
                known = [f"{heading} {text}" for heading, text in texts.items() if text != UNKNOWN]
                lines.append(f"{run.folder.name}: {run.state}, {', '.join(known)}")
        return lines


def progress_of(run: RunStatus) -> Progress:
    """How far a run is, by the end of its metrics.jsonl."""
    config = run.record.get("config", {})
    steps = _number(config, "steps")
    files = metrics_files(run.folder)  # several are the stages of an online run
    found = Progress(steps=int(steps * (_number(config, "stages") or 1)) if steps else None)
    if not files:
        return found
    train: list[dict[str, Any]] = []
    heldout: dict[str, Any] = {}
    for row in _rows_reversed(files[-1]):
        if found.step is None:
            found.step = row["step"] + int(steps or 0) * (len(files) - 1)
        if row.get("split") == "heldout":
            heldout = heldout or row
        elif len(train) < SPEED_OVER:
            train.append(row)
        if heldout and len(train) == SPEED_OVER:
            break
    found.time = files[-1].stat().st_mtime
    found.train_loss, found.heldout_loss = _number(train[0], "loss") if train else None, _number(heldout, "loss")
    if speeds := [speed for row in train if (speed := _number(row, "pairs_per_second"))]:
        found.pairs_per_second = len(speeds) / sum(1 / speed for speed in speeds)  # steps have equally many pairs
    return found


def _number(row: dict[str, Any], key: str) -> float | None:
    """A number in a record or row that may be damaged."""
    return row[key] if is_kind(row.get(key), NUMBER) else None


def _rows_reversed(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a metrics.jsonl from the last to the first, without those that are not whole."""
    for _, line in read_lines_reversed(file):
        try:
            row = json.loads(line)
        except ValueError:  # the line that is being written, or one that is damaged
            continue
        if isinstance(row, dict) and is_kind(row.get("step"), WHOLE):
            yield row
