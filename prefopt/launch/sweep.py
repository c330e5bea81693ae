"""Sweeps: check every job, freeze it, have it run by a process of its own, and say what became of it.

    python -m prefopt.train -m objective=dpo,simpo objective.beta=0.01,0.1
    python -m prefopt.train -m launcher=slurm +sweep=objectives --dry-run
    python -m prefopt.harness -m run=runs/A,runs/B tasks=mmpo launcher=slurm launcher.partition=gpu

Hydra composes the points of the sweep and no more. One job that is refused refuses the sweep. Then a job's resolved
config goes into job.json in its folder, and the package, as it is now, into a folder named by its content
(code/DIGEST beside the jobs' folders): the job runs that, whatever happens to YAMLs, branches and files meanwhile.
`prefopt.job` runs it; its output is in log.txt of its folder.

The same command again skips what is finished, waits for what is under way, and runs the rest, from the last checkpoint
where there is one.
"""

import dataclasses
import logging
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from prefopt.cli.multirun import Point
from prefopt.config.parse import build, parse
from prefopt.errors import MissingAssetError, UserError
from prefopt.launch.base import Launcher, SweepJob
from prefopt.launch.snapshot import snapshot
from prefopt.tracking.process import ACTIVE_STATES, process_info
from prefopt.tracking.record import write_record
from prefopt.tracking.status import RunStatus, inspect_runs, status_table
from prefopt.utils.console import console, rows_table
from prefopt.utils.distributed import world_size
from prefopt.utils.files import write_json

log = logging.getLogger(__name__)

T = TypeVar("T")

POLL_S = 3.0


@dataclass(frozen=True)
class Sweep:
    """A program's sweep; calling it launches the points of one.

    `plan(point, label, config, launcher, folder)` checks a point and returns its job, whose folder is `folder` unless
    it has a run's. At the end the last `log_lines` lines of each job's log are shown (0: all), or, where that is None,
    a table of the runs.
    """

    program: str
    schema: type[Any]
    plan: Callable[[Point, str, Any, Launcher, Path], SweepJob]
    log_lines: int | None = None

    def __call__(self, points: list[Point], folder: Path, dry_run: bool) -> int:
        """Run the jobs; 0 when all have finished, else 1. With `dry_run` only the table of jobs is printed. `folder` is
        the sweep's own.

        Raises UserError, and starts nothing, where any job is refused.
        """
        if world_size() > 1:
            raise UserError(
                "a sweep is started once, not by several processes (torchrun): its launcher starts the jobs."
            )
        if dry_run:
            return self.preview(points, folder)
        launcher, jobs = self.plan_jobs(points, folder)
        rows = [
            (job.label, job.folder.name, planned_action(job), launcher.resources(job) if job.to_run else "–")
            for job in jobs
        ]
        console().print(
            rows_table(
                ("job", "folder", "what happens", "resources"), rows, self.title(len(jobs), jobs[0].folder.parent)
            )
        )
        if to_run := [job for job in jobs if job.to_run]:
            code = snapshot(to_run[0].folder.parent / "code")
            for job in to_run:
                write_job_file(job, self.program, code)
            launcher.run(to_run, code, folder)
        found = wait_for_runs([job.folder for job in jobs])
        if self.log_lines is None:
            console().print(status_table(found))
        else:
            for job in jobs:
                log = job.folder / "log.txt"
                lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
                print(job.label, *lines[-self.log_lines :], "", sep="\n")
        return exit_status(found)

    def plan_jobs(self, points: list[Point], folder: Path) -> tuple[Launcher, list[SweepJob]]:
        """The sweep's launcher, and its jobs; of several with one folder, the first. Raises UserError that names every
        job that is refused."""
        launcher, found = validate_points(points, self.schema, self._planner(folder))
        jobs: dict[Path, SweepJob] = {}
        for job in found:
            jobs.setdefault(job.folder, job)
        refresh_status(list(jobs.values()))
        return launcher, list(jobs.values())

    def preview(self, points: list[Point], folder: Path) -> int:
        """Print what a sweep would do and, by estimate, take; 0. A model or data set that is not here yet is named
        below the table, and refuses nothing."""
        from prefopt.launch.estimate import GPU, Estimate, estimate
        from prefopt.objectives.base import Objective
        from prefopt.training.config import TrainConfig

        lacking: dict[str, None] = {}
        plan = self._planner(folder)

        def planned(point: Point, label: str, config: Any, launcher: Launcher) -> tuple[str, Any, SweepJob | None]:
            try:
                return label, config, plan(point, label, config, launcher)
            except MissingAssetError as error:
                lacking.update(dict.fromkeys(str(error).splitlines()))
                return label, config, None

        launcher, found = validate_points(points, self.schema, planned)
        refresh_status([job for _, _, job in found if job])
        trains = self.schema is TrainConfig  # no estimate of other jobs yet
        rows, estimates = [], list[Estimate]()
        for label, config, job in found:
            cells, sizes = ["–", "waits for what is lacking", "–"], ["–", "–"]
            if job:
                cells = [job.folder.name, planned_action(job), launcher.resources(job) if job.to_run else "–"]
            if trains and (job is None or job.to_run):
                size = estimate(config, build(config.objective, Objective, "objective"))
                if size:
                    estimates.append(size)
                    sizes = [f"{size.gpu_hours:.2g}", f"{size.policies_gb:.2g}"]
            rows.append([label, *cells, *sizes])
        caption = ""
        if trains:
            hours, kept = sum(e.gpu_hours for e in estimates), sum(e.policies_gb for e in estimates)
            at_work = max((e.checkpoint_gb for e in estimates), default=0.0)
            caption = (
                f"Estimates for {len(estimates)} jobs, without evaluations after training: {hours:.3g} GPU hours "
                f"({GPU}), {kept:.3g} GB of policies, and up to {at_work:.2g} GB more for the checkpoint of each job "
                "under way."
            )
        headings = ("job", "folder", "what happens", "resources", "GPU hours", "policies, GB")
        parents = [job.folder.parent if job else Path(config.runs_dir) for _, config, job in found]
        title = self.title(len(found), parents[0])
        console().print(rows_table(headings, rows, title, caption))
        if lacking:
            print("\n".join(["lacking, before this can start:", *lacking]))
        return 0

    def title(self, jobs: int, parent: Path) -> str:
        return f"{jobs} jobs of prefopt.{self.program}, folders in {parent}"

    def _planner(self, folder: Path) -> Callable[[Point, str, Any, Launcher], SweepJob]:
        numbers = iter(range(sys.maxsize))
        return lambda point, label, config, launcher: self.plan(
            point, label, config, launcher, folder / f"job_{next(numbers)}"
        )


def planned_action(job: SweepJob) -> str:
    """What the sweep does with a job, in words."""
    from prefopt.training.checkpoint import complete_checkpoints

    if job.run is None:
        return "what is not done yet"
    if not job.to_run:
        return {"finished": "finished", "unknown": f"left alone: may run on {job.run.record['host']}"}.get(
            job.state, f"{job.state}: waits for it"
        )
    checkpoint = max(complete_checkpoints(job.run.checkpoints), default=None)
    start = f"from step {int(checkpoint.name.removeprefix('step_'))}" if checkpoint else "from the start"
    return start if job.state == "new" else f"{job.state}: again {start}"


def exit_status(found: list[RunStatus]) -> int:
    """0 where all have finished; else 1, and why they have not on stderr."""
    bad = [each for each in found if each.state != "finished"]
    for each in bad:
        log = f"\n    {each.log}" if each.log.is_file() else ""
        print(f"{each.state}: {each.folder.name}: {each.why}{log}", file=sys.stderr)
    if bad:
        print(f"{len(bad)} of {len(found)} jobs have not finished; the same command tries them again", file=sys.stderr)
    return 1 if bad else 0


def validate_points(
    points: list[Point], schema: type[Any], make: Callable[[Point, str, Any, Launcher], T]
) -> tuple[Launcher, list[T]]:
    """The sweep's launcher, and `make(point, label, config, launcher)` of each point, whose label is what tells it from
    the others. Raises UserError that names every point that `make` or the schema refuses."""
    first = parse(points[0].cfg, schema).launcher
    launcher = build(first, Launcher, "launcher")
    shared = set.intersection(*(set(point.overrides) for point in points)) if len(points) > 1 else set()
    problems, made = [], []
    for point in points:
        label = " ".join(o for o in point.overrides if o not in shared)
        try:
            config = parse(point.cfg, schema)
            if config.launcher != first:
                raise UserError("the jobs of a sweep have one launcher; do not sweep over `launcher`")
            made.append(make(point, label, config, launcher))
        except UserError as error:
            problems.append(f"{label}: {error}")
    if problems:
        raise UserError("\n".join(["nothing was started, because of these jobs:", *problems]))
    return launcher, made


def refresh_status(jobs: list[SweepJob]) -> None:
    """See what became of the jobs' runs before. All at once: Slurm is asked for all of its jobs, however many.

    Raises UserError where a folder that is no run's belongs to a job under way: it may be another one.
    """
    folders = {job.folder: job for job in jobs}
    for seen in inspect_runs([folder for folder in folders if (folder / "record.json").is_file()]):
        job = folders[seen.folder]
        if job.run:
            job.state = seen.state
        elif seen.state in ACTIVE_STATES:
            raise UserError(f"{job.folder} belongs to a sweep that is under way. Wait for it, or give another folder.")


def command_of(program: str, overrides: list[str]) -> str:
    """What does here, and alone, what a job of the sweep with these overrides does."""
    return f"python -m prefopt.{program} {shlex.join(o for o in overrides if not o.startswith('launcher'))}"


def write_job_file(job: SweepJob, program: str, code: Path) -> None:
    """Write job.json, from which `prefopt.job` runs the job, and a record that it is queued by this process."""
    origin = {"command": command_of(program, job.overrides), "code": str(code)}
    write_json(job.folder / "job.json", {"program": program, "config": dataclasses.asdict(job.config), **origin})
    queued: dict[str, Any] = {"status": "queued", "error": None, **origin, **process_info(), "slurm_job": None}
    if job.run:
        job.run.update(**queued)
    else:
        write_record(job.folder, {"name": job.id, **queued})


def wait_for_runs(folders: list[Path]) -> list[RunStatus]:
    """Until none of the runs is under way, with a line for every change. What is seen last.

    A run counts as dead when it has looked so three times: a file system may show a record late. One that has finished
    is not looked at again.
    """
    before: dict[Path, str] = {}
    dead = dict.fromkeys(folders, 0)
    seen: dict[Path, RunStatus] = {}
    while True:
        seen |= {each.folder: each for each in inspect_runs([f for f in folders if before.get(f) != "finished"])}
        found = [seen[folder] for folder in folders]
        for each in found:
            dead[each.folder] = dead[each.folder] + 1 if each.state == "died" else 0
            if before.get(each.folder, each.state) != each.state:
                log.info(f"{each.folder.name}: {each.state} {each.why}".rstrip())
            before[each.folder] = each.state
        asked = [each for each in found if each.state == "unknown" and each.record.get("slurm_job")]
        if not asked and not any(f.state in ACTIVE_STATES or 0 < dead[f.folder] < 3 for f in found):
            return found
        time.sleep(POLL_S)
