"""Sweeps of other programs than prefopt.train: every point is checked, frozen and run as a job of its own, here or by
Slurm, as a sweep of training runs is.

    python -m prefopt.harness -m run=runs/A,runs/B tasks=mmpo launcher=slurm launcher.partition=gpu
    python -m prefopt.online -m objective=dpo,mappo scorer=vader prompts=prompts.jsonl steps=8 launcher.at_once=2

What a job has done is kept by the program itself, so the same command again does only what is missing.
"""

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from prefopt import UserError
from prefopt.config import AlpacaConfig, HarnessConfig, ModelConfig, OnlineConfig
from prefopt.launch import Launcher, checked, command_of, snapshot, verdict, wait
from prefopt.liveness import UNDER_WAY, here
from prefopt.paths import write_json
from prefopt.program import Launch, Point
from prefopt.runs import console, look

# What each reads; its go_on(config, command=..., code=...) does whatever is not done yet.
SCHEMAS: dict[str, type[HarnessConfig | AlpacaConfig | OnlineConfig]] = {
    "harness": HarnessConfig,
    "alpaca": AlpacaConfig,
    "online": OnlineConfig,
}


@dataclass
class Task:
    """One point; its folder holds job.json, record.json and log.txt."""

    label: str
    config: Any
    model: ModelConfig
    folder: Path

    @property
    def id(self) -> str:
        return self.folder.name

    @property
    def hardware(self) -> str:
        return f"{self.config.precision} on {self.config.device}"


def sweep(program: str, check: Callable[[Any, Launcher], ModelConfig], shown_lines: int = 0) -> Launch:
    """launch(points, folder, dry_run) for `program`. `check` raises UserError for a config that it cannot run, and says
    which model it would load. At the end the last `shown_lines` lines of each job's log are shown (0: all of them)."""

    def launch(points: list[Point], folder: Path, dry_run: bool) -> int:
        numbers = itertools.count()

        def make(point: Point, label: str, config: Any, launcher: Launcher) -> Task:
            return Task(label, config, check(config, launcher), folder / f"job_{next(numbers)}")

        launcher, tasks = checked(points, SCHEMAS[program], make)
        shown = Table("job", "resources", title=f"{len(tasks)} jobs of prefopt.{program}, in {folder}")
        for task in tasks:
            shown.add_row(task.label, launcher.resources(task))
        console().print(shown)
        if dry_run:
            return 0
        begun = look([task.folder for task in tasks if (task.folder / "record.json").is_file()])
        if busy := [each.folder for each in begun if each.state in UNDER_WAY]:
            raise UserError(f"{busy[0]} belongs to a sweep that is under way. Wait for it, or give another folder.")
        code = snapshot(folder / "code")
        for task, point in zip(tasks, points, strict=True):
            told = {"command": command_of(program, point.overrides), "code": str(code)}
            frozen = {"program": program, "config": dataclasses.asdict(task.config), **told}
            write_json(task.folder / "job.json", frozen)
            record = {"status": "queued", "name": task.id, "error": None, **told, **here(), "slurm_job": None}
            write_json(task.folder / "record.json", record)
        launcher.run(tasks, code, folder)
        found = wait([task.folder for task in tasks])
        for task in tasks:
            log = task.folder / "log.txt"
            lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
            print(task.label, *lines[-shown_lines:], "", sep="\n")
        return verdict(found)

    return launch
