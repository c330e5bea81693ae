"""Going on from a finished run with a longer one: which run that is, what the longer schedule makes of it, and the new
run's folder with its last checkpoint in it.

A run is a function of its config and the step, but for the learning rate, which also knows the number of steps. So a
longer run may begin where a shorter one has ended, and is the run of that length from the start if the learning rate
was the same so far.
"""

import functools
import glob
import logging
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prefopt.config.parse import build
from prefopt.errors import UserError
from prefopt.tracking.metrics import PER_ITEM, metrics_damage
from prefopt.tracking.record import load_record, record_of
from prefopt.tracking.run import Run, changed_parts, deciding_part, flatten
from prefopt.training.checkpoint import complete_checkpoints, load_meta
from prefopt.training.config import AUTO, TrainConfig
from prefopt.training.optim import Schedule
from prefopt.utils.files import atomic_write, remove, sync
from prefopt.utils.fingerprint import fingerprint
from prefopt.utils.store import damage

log = logging.getLogger(__name__)

Model = Callable[[], dict[str, str]]
LENGTH = ("steps", "epochs", "eval_every")  # in these a run differs from a longer one
CHOSEN = ("schedule", "optimizer.lr")  # and with resume=RUN it may differ in these


@dataclass(frozen=True)
class Origin:
    """The finished run in `folder` that a run of `steps` steps goes on from, after the `step` steps that it took.

    `same_so_far`: whether the learning rate was so far what it is in a run of `steps` steps from the start.
    """

    folder: Path
    record: dict[str, Any]
    checkpoint: Path
    step: int
    steps: int
    same_so_far: bool
    rates: tuple[float, float]  # at its last step, and at the next one

    @property
    def facts(self) -> dict[str, Any]:
        """What the record of the longer run says of it."""
        return {"run": self.record["name"], "step": self.step, "same_as_from_the_start": self.same_so_far}

    def check_model(self, parts: dict[str, str]) -> None:
        """Raise UserError where the run began from another model than there is now (`parts`: as in its record)."""
        if changed := changed_parts(self.record, parts):
            raise UserError(f"{self.folder} began from another model than there is now (changed: {', '.join(changed)})")


def find_origin(config: TrainConfig, run: Run, schedule: Schedule, model: Model) -> Origin | None:
    """The run that `config.resume` names, or, where that is `auto`, the longest one in `runs_dir` that differs from
    `run` in its length alone. None for none, and where `run` was begun already. `model` reads the digests of the
    model's parts as they are now.

    Raises UserError where `resume` names a run that cannot be gone on from, or `run` was begun from another.
    """
    begun_from = (run.record.get("continued_from") or {}).get("run")
    if config.resume == AUTO:
        return None if run.begun else _longest(config, run, schedule, model)
    if config.resume is None:
        if run.begun and begun_from:
            raise UserError(
                f"{run.folder} was continued from {begun_from}: to train it from the start, move the folder away."
            )
        return None

    folder = Path(config.resume)
    if not (folder / "record.json").is_file() and (Path(config.runs_dir) / folder / "record.json").is_file():
        folder = Path(config.runs_dir) / folder
    try:
        record = record_of(str(folder))
    except UserError as error:
        raise UserError(f"resume={config.resume}: {str(error).removeprefix('run=')}") from None
    if folder.resolve() == run.folder.resolve():
        log.info(f"resume={config.resume} is the run of this very command, which goes on without it, too")
        return None
    if run.begun:
        if begun_from == record["name"]:
            return None
        raise UserError(
            f"resume={config.resume}: {run.folder} is there already, begun from {begun_from or 'the start'}: move the "
            "folder away to begin it from another run."
        )
    try:
        return _origin(config, run, schedule, folder, record, model)
    except UserError as error:
        raise UserError(f"resume={config.resume}: {error}") from None


def _longest(config: TrainConfig, run: Run, schedule: Schedule, model: Model) -> Origin | None:
    """The run that `auto` goes on from. Why the longest one cannot be gone on from is said."""
    wanted = _family(asdict(config), run.record["data_digests"])
    shorter = []
    for file in Path(config.runs_dir).glob(f"{glob.escape(run.name.removesuffix(run.id))}*/record.json"):
        status = file.stat()
        record = _read(file, status.st_size, status.st_mtime_ns)
        if record is None or file.parent == run.folder or record["family"] != wanted:
            continue
        if _length(config, record) > record["config"]["steps"]:
            shorter.append((record["config"]["steps"], str(file.parent), record))
    for n, (steps, folder, record) in enumerate(sorted(shorter, key=lambda run: run[:2], reverse=True)):
        try:
            return _origin(config, run, schedule, Path(folder), record, model)
        except UserError as error:
            if n == 0:
                log.info(f"  not going on from {folder}, which has taken {steps} steps: {error}")
    return None


@functools.lru_cache(4096)
def _read(file: Path, size: int, changed_ns: int) -> dict[str, Any] | None:
    """The record of a finished run, with its `family`; None for others. Cached, because every job of a sweep asks."""
    try:
        record = load_record(file)
    except UserError:  # `prefopt runs` names it
        return None
    if record["status"] != "finished" or not {"config", "data_digests", "data"} <= record.keys():
        return None
    return record | {"family": _family(record["config"], record["data_digests"])}


def _family(config: dict[str, Any], digests: dict[str, str]) -> str:
    """What runs that differ in their length alone have in common."""
    return fingerprint([{k: v for k, v in deciding_part(config).items() if k not in LENGTH}, digests])


def _length(config: TrainConfig, record: dict[str, Any]) -> int:
    """The steps that `config` takes, which has the data of `record`."""
    pairs = record["data"]["train"]["items"]
    return config.steps or math.ceil((config.epochs or 1) * pairs / config.batch_size)


def _origin(
    config: TrainConfig, run: Run, schedule: Schedule, folder: Path, record: dict[str, Any], model: Model
) -> Origin:
    """Raises UserError where the run in `folder` cannot be gone on from."""
    if record["status"] != "finished":
        raise UserError(f"{folder} is {record['status']}: let its own command finish it first: {record.get('command')}")
    if record.get("data_digests") != run.record["data_digests"]:
        raise UserError(f"{folder} was trained on other data than there are now.")
    if differing := _differences(record["config"], asdict(config)):
        raise UserError(
            f"{folder} differs in more than its length, schedule and learning rate: {'; '.join(differing)}. Give its "
            f"own settings, as its command does: {record.get('command')}"
        )
    before, steps = record["config"]["steps"], _length(config, record)
    checkpoint = max(complete_checkpoints(folder / "checkpoints"), default=None)
    if checkpoint is None:
        raise UserError(f"{folder} has no checkpoint any more; keep_checkpoint=true keeps the last one.")
    step = load_meta(checkpoint)["step"]
    if step != before:
        raise UserError(
            f"{folder} was ended by patience={record['config']['patience']}, after {step} of {before} steps."
        )
    if steps <= step:
        raise UserError(f"{folder} has taken {step} steps, and this run takes {steps}: give more steps or epochs.")
    if lost := [s for s in config.export_steps(steps) if s <= step]:
        raise UserError(f"{folder} is past step {lost[-1]}, whose policy exports={config.exports} asks for.")

    theirs = build(record["config"]["schedule"], Schedule, "schedule")
    peaks = record["config"]["optimizer"]["lr"], config.optimizer.peak
    same = all(peaks[0] * theirs(s, before) == peaks[1] * schedule(s, steps) for s in range(step))
    same = same and (record.get("continued_from") or {}).get("same_as_from_the_start", True)
    rates = peaks[0] * theirs(step - 1, before), peaks[1] * schedule(step, steps)
    origin = Origin(folder, record, checkpoint, step, steps, same, rates)
    origin.check_model(model())
    return origin


def _differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """The settings of two configs that differ though they must not: "key: theirs, ours"."""
    a, b = (dict(flatten(deciding_part(config))) for config in (theirs, ours))
    return [
        f"{key}: {a.get(key)}, here {b.get(key)}"
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key) and not any(key == may or key.startswith(f"{may}.") for may in (*LENGTH, *CHOSEN))
    ]


def describe(origin: Origin, config: TrainConfig) -> list[str]:
    """What is said before the run: where it goes on, and what the schedule makes of it."""
    length = f"steps={config.steps}" if config.epochs is None else f"epochs={config.epochs:g}"
    lines = [f"going on from {origin.folder}, which has taken {origin.step} of the {origin.steps} steps"]
    if origin.same_so_far:
        lines.append(f"the learning rate was the same so far: this is the run that {length} is from the start")
        return lines
    last, next_ = origin.rates
    turn = "rises" if next_ > last else "falls" if next_ < last else "stays"
    name = str(config.schedule["_target_"]).rpartition(".")[2].lower()
    lines.append(
        f"the learning rate {turn} from {last:.2g} to {next_:.2g}, as {name} over {length} has it there: this is not "
        f"the run that {length} is from the start (for that one: resume=null)"
    )
    return lines


def seed(run: Run, origin: Origin) -> None:
    """Give the run, which this process holds, the last checkpoint of its origin, with the metrics, samples and held-out
    pairs until there. The checkpoint comes last and whole: without it the run has not begun.

    Raises UserError where what is taken is damaged, and OSError where it cannot be written.
    """
    if run.begun:  # another process has done it meanwhile
        return
    metrics, vouched = origin.folder / "metrics.jsonl", load_meta(origin.checkpoint)["metrics"]
    if why := damage(origin.checkpoint) or metrics_damage(metrics, vouched):
        raise UserError(
            f"{origin.checkpoint} is damaged: {why}. Bring it back, or train from the start by resume=null."
        )
    for kind in PER_ITEM:
        for file in sorted((origin.folder / kind).glob("step_*")):
            target = run.folder / kind / file.name
            target.parent.mkdir(exist_ok=True)
            target.unlink(missing_ok=True)
            _link(file, target)
    with metrics.open("rb") as content:
        atomic_write(run.metrics_file, content.read(vouched["length"]))

    run.checkpoints.mkdir(exist_ok=True)
    target = run.checkpoints / origin.checkpoint.name
    aside = run.folder / "checkpoint.tmp"  # beside checkpoints/, where it would be the beginning of one
    remove(aside)
    aside.mkdir()
    for file in sorted(origin.checkpoint.iterdir()):
        _link(file, aside / file.name)
    sync(aside)
    aside.rename(target)
    sync(run.checkpoints)


def _link(source: Path, target: Path) -> None:
    """A hard link, which takes no room: neither file is ever changed in place. A copy where there can be none."""
    try:
        os.link(source, target)
    except OSError:  # another disk, or a file system without hard links
        shutil.copyfile(source, target)
        sync(target)
