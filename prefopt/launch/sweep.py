"""Sweeps: check every job, freeze it, start it in its own process, and show how it ended.

    python -m prefopt.train -m objective=dpo,simpo objective.beta=0.01,0.1
    python -m prefopt.train -m launcher=slurm +sweep=objectives precision=bfloat16 --dry-run
    python -m prefopt.harness -m run=runs/A,runs/B tasks=mmpo launcher=slurm launcher.partition=gpu

Hydra only composes the points of the sweep. If one job is refused, nothing is started. A job's resolved config is
written into job.json in its folder, and the package is copied to code/DIGEST beside the jobs' folders. So later changes
to YAMLs, branches and files do not reach a job that waits. `prefopt.job` runs it; its output is in log.txt.

The same command again skips finished jobs, waits for those under way, and starts the rest, from their last checkpoint.
"""

import dataclasses
import logging
import os
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
from prefopt.tracking.process import ACTIVE_STATES, describe_owner, process_info
from prefopt.tracking.provenance import note_edited_code
from prefopt.tracking.record import amending, write_record
from prefopt.tracking.status import RunStatus, inspect_runs, status_table
from prefopt.utils.console import console, rows_table
from prefopt.utils.distributed import world_size
from prefopt.utils.files import write_json

log = logging.getLogger(__name__)

T = TypeVar("T")

POLL_S = 3.0


@dataclass(frozen=True)
class Sweep:
    """How a program sweeps. Calling it launches the points of a sweep.

    `plan(point, label, config, launcher, folder)` checks a point and returns its job. The job's folder is that of its
    run, or, for a job that is no training run, `folder`. At the end the last `log_lines` lines of each job's log are
    shown (0: all lines); with None it is a table of the runs. `finish(folder)` is called for each finished job: it
    does what a job that was killed after its end has left.
    """

    program: str
    schema: type[Any]
    plan: Callable[[Point, str, Any, Launcher, Path], SweepJob]
    log_lines: int | None = None
    finish: Callable[[Path], None] | None = None

    def __call__(self, points: list[Point], folder: Path, dry_run: bool) -> int:
        """Run the jobs; the exit code: 0 when all have finished, else 1. With `dry_run` only the table is printed.

        `folder` is for the files of the sweep itself. Raises UserError, and starts nothing, where any job is refused.
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

        for job in jobs:
            if job.run and job.run.finished and job.run.record.get("code"):
                note_edited_code(Path(job.run.record["code"]))
        if to_run := [job for job in jobs if job.to_run]:
            launcher.check()
            code = snapshot(to_run[0].folder.parent / "code")
            to_run = [job for job in to_run if write_job_file(job, self.program, code)]
            if to_run:
                launcher.run(to_run, code, folder)

        # Also for the jobs that were under way before.
        runs = wait_for_runs([job.folder for job in jobs])
        for run in runs:
            if self.finish and run.state == "finished":
                self.finish(run.folder)
        if self.log_lines is None:
            console().print(status_table(runs))
        else:
            for job in jobs:
                log = job.folder / "log.txt"
                lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
                print(job.label, *lines[-self.log_lines :], "", sep="\n")
        return exit_status(runs)

    def plan_jobs(self, points: list[Point], folder: Path) -> tuple[Launcher, list[SweepJob]]:
        """The sweep's launcher and its jobs. Raises UserError that names every job that is refused."""
        launcher, planned = validate_points(points, self.schema, self._planner(folder))
        by_folder: dict[Path, SweepJob] = {}
        for job in planned:  # points that differ in what changes no result (runs_dir, logger) are one run
            by_folder.setdefault(job.folder, job)
        jobs = list(by_folder.values())
        say_repeated(len(planned) - len(jobs))
        refresh_status(jobs)
        group = sweep_name(points)
        for job in jobs:
            if (logger := getattr(job.config, "logger", None)) and logger.wandb:
                logger.wandb.group = logger.wandb.group or os.environ.get("WANDB_RUN_GROUP") or group
        return launcher, jobs

    def preview(self, points: list[Point], folder: Path) -> int:
        """Print what a sweep would do, with estimates of time, disk and memory; the exit code 0.

        A model or data set that is not on this machine is named below the table. Raises UserError for other refusals.
        """
        from huggingface_hub import constants

        from prefopt.launch.estimate import GPU, Estimate, estimate
        from prefopt.launch.fit import Fit, fit, print_memory, same_memory
        from prefopt.objectives.base import Objective
        from prefopt.training.config import TrainConfig

        # What is not here is lacking: nothing asks the hub, which without a network takes minutes to say no.
        os.environ["HF_HUB_OFFLINE"], constants.HF_HUB_OFFLINE = "1", True
        lacking: dict[str, None] = {}  # in order, each once
        plan = self._planner(folder)

        def planned(point: Point, label: str, config: Any, launcher: Launcher) -> tuple[str, Any, SweepJob | None]:
            try:
                return label, config, plan(point, label, config, launcher)
            except MissingAssetError as error:
                lacking.update(dict.fromkeys(str(error).splitlines()))
                return label, config, None

        launcher, every = validate_points(points, self.schema, planned)
        # As in `plan_jobs`; what has no folder yet is known by its label.
        known: dict[Path | str, tuple[str, Any, SweepJob | None]] = {}
        for label, config, job in every:
            known.setdefault(job.folder if job else label, (label, config, job))
        jobs = list(known.values())
        say_repeated(len(every) - len(jobs))
        refresh_status([job for _, _, job in jobs if job])

        trains = issubclass(self.schema, TrainConfig)  # no estimate of other jobs yet
        rows, estimates = [], list[Estimate]()
        fits: dict[str, tuple[list[str], Fit | None]] = {}  # by what decides about memory: names of jobs, and theirs
        for label, config, job in jobs:
            cells, sizes = ["–", "waits for what is lacking", "–"], ["–", "–"]
            if job:
                cells = [job.folder.name, planned_action(job), launcher.resources(job) if job.to_run else "–"]
            if trains and (job is None or job.to_run):
                objective = build(config.objective, Objective, "objective")
                size = estimate(config, objective)
                key = same_memory(config, objective)
                if key not in fits:
                    memory_gib = launcher.device_memory_gib(config)
                    fits[key] = [], fit(config, objective, memory_gib, launcher.processes)
                fits[key][0].append(f"{config.model.name} {objective.name}")
                if size:
                    estimates.append(size)
                    sizes = [f"{size.gpu_hours:.2g}", f"{size.kept_gb:.2g}"]
            rows.append([label, *cells, *sizes])

        caption = ""
        if trains:
            hours, kept = sum(e.gpu_hours for e in estimates), sum(e.kept_gb for e in estimates)
            at_work = max((e.checkpoint_gb for e in estimates), default=0.0)
            caption = (
                f"Estimates for {len(estimates)} jobs, without evaluations after training: {hours:.3g} GPU hours "
                f"({GPU}), {kept:.3g} GB that are kept (policies, and last checkpoints unless keep_checkpoint=false), "
                f"and up to {at_work:.2g} GB more for the checkpoint of each job under way."
            )
        headings = ("job", "folder", "what happens", "resources", "GPU hours", "kept, GB")
        parents = [job.folder.parent if job else Path(config.runs_dir) for _, config, job in jobs]
        title = self.title(len(jobs), parents[0])
        console().print(rows_table(headings, rows, title, caption))
        if fits:
            print_memory(list(fits.values()), launcher.device_memory_gib(jobs[0][1]))
        if lacking:
            print("\n".join(["lacking, before this can start:", *lacking]))
        return 0

    def title(self, jobs: int, parent: Path) -> str:
        return f"{jobs} jobs of prefopt.{self.program}, folders in {parent}"

    def _planner(self, folder: Path) -> Callable[[Point, str, Any, Launcher], SweepJob]:
        """`plan` with a new folder below `folder` at each call."""
        numbers = iter(range(sys.maxsize))
        return lambda point, label, config, launcher: self.plan(
            point, label, config, launcher, folder / f"job_{next(numbers)}"
        )


def sweep_name(points: list[Point]) -> str | None:
    """The sweep's file (+sweep=NAME), or the keys in which its points differ; None for a single point without one."""
    for override in points[0].overrides:
        key, _, value = override.partition("=")
        if key.lstrip("+") == "sweep":
            return value
    shared = shared_overrides(points)
    keys = (o.partition("=")[0] for point in points for o in point.overrides if o not in shared and len(points) > 1)
    return ", ".join(dict.fromkeys(keys))[:128] or None


def shared_overrides(points: list[Point]) -> set[str]:
    """The overrides that all points have; of a single point none, so that its label says what it is."""
    return set.intersection(*(set(point.overrides) for point in points)) if len(points) > 1 else set()


def planned_action(job: SweepJob) -> str:
    """What the sweep does with a job, in words: for the table of jobs."""
    from prefopt.training.checkpoint import complete_checkpoints

    if job.run is None:
        return "what is not done yet"
    if not job.to_run:
        return {"finished": "finished", "unknown": f"left alone: may run on {job.run.record['host']}"}.get(
            job.state, f"{job.state}: waits for it"
        )
    checkpoint = max(complete_checkpoints(job.run.checkpoints), default=None)
    start = f"from step {int(checkpoint.name.removeprefix('step_'))}" if checkpoint else "from the start"
    if checkpoint is None and job.config.resume:
        start = f"from the end of {Path(job.config.resume).name}"
    return start if job.state == "new" else f"{job.state}: again {start}"


def exit_status(runs: list[RunStatus]) -> int:
    """0 where all runs have finished; else 1, and the reasons are printed on stderr."""
    unfinished = [run for run in runs if run.state != "finished"]
    for run in unfinished:
        log = f"\n    {run.log}" if run.log.is_file() else ""
        print(f"{run.state}: {run.folder.name}: {run.why}{log}", file=sys.stderr)
    if unfinished:
        count = f"{len(unfinished)} of {len(runs)}"
        print(f"{count} jobs have not finished; the same command tries them again", file=sys.stderr)
    return 1 if unfinished else 0


def validate_points(
    points: list[Point], schema: type[Any], make: Callable[[Point, str, Any, Launcher], T]
) -> tuple[Launcher, list[T]]:
    """The sweep's launcher, and the results of `make(point, label, config, launcher)` for all points.

    The label of a point are the overrides that not all points have. Raises UserError that names every point that the
    schema or `make` refuses.
    """
    first = parse(points[0].cfg, schema).launcher
    launcher = build(first, Launcher, "launcher")
    shared = shared_overrides(points)
    refused: dict[str, list[str]] = {}  # labels by the reason, which all points of a sweep may share
    made = []
    for point in points:
        label = " ".join(o for o in point.overrides if o not in shared)
        try:
            config = parse(point.cfg, schema)
            if config.launcher != first:
                raise UserError("the jobs of a sweep have one launcher; do not sweep over `launcher`")
            made.append(make(point, label, config, launcher))
        except UserError as error:
            refused.setdefault(str(error), []).append(label)
    if refused:
        problems = [f"{'; '.join(labels)}: {reason}" for reason, labels in refused.items()]
        raise UserError("\n".join(["nothing was started, because of these jobs:", *problems]))
    return launcher, made


def say_repeated(number: int) -> None:
    """Log how many points of a sweep are repetitions of others."""
    if number:
        log.info(f"{number} points compute what others do, and are not run again")


def refresh_status(jobs: list[SweepJob]) -> None:
    """Set the `state` of the jobs that are training runs.

    Raises UserError where another job's folder is in use: a run's folder is named by what it computes, and is taken
    for the same job, but this one may belong to a job with another config.
    """
    by_folder = {job.folder: job for job in jobs}
    # All at once, since each call asks Slurm for all of its jobs.
    for status in inspect_runs([folder for folder in by_folder if (folder / "record.json").is_file()]):
        job = by_folder[status.folder]
        if job.run:
            job.state = status.state
        elif status.state in ACTIVE_STATES:
            raise UserError(f"{job.folder} belongs to a sweep that is under way. Wait for it, or give another folder.")


def command_of(program: str, overrides: list[str]) -> str:
    """The command that does the work of one job of the sweep on this machine."""
    return f"python -m prefopt.{program} {shlex.join(o for o in overrides if not o.startswith('launcher'))}"


def write_job_file(job: SweepJob, program: str, code: Path) -> bool:
    """Write job.json, from which `prefopt.job` runs the job, and a record that it is queued by this process. Returns
    False, and writes nothing, where another sweep has queued, begun or finished the run since it was planned."""
    origin = {"command": command_of(program, job.overrides), "code": str(code)}
    frozen = {"program": program, "config": dataclasses.asdict(job.config), **origin}
    queued: dict[str, Any] = {"status": "queued", "error": None, **origin, **process_info(), "slurm_job": None}
    with amending(job.folder):
        if job.run and (job.folder / "record.json").is_file():
            (status,) = inspect_runs([job.folder])
            job.state = status.state
            if not job.to_run:
                log.info(f"{job.folder.name}: {job.state} meanwhile, by {describe_owner(status.record)}; waits for it")
                return False
            job.run.reload()
        write_json(job.folder / "job.json", frozen)
        if job.run:
            job.run.update(**queued)
        else:
            write_record(job.folder, {"name": job.id, **queued})
    return True


def wait_for_runs(folders: list[Path]) -> list[RunStatus]:
    """Wait until none of the runs is under way, and print a line for every change. The last status of all runs."""
    latest: dict[Path, RunStatus] = {}
    times_dead = dict.fromkeys(folders, 0)  # in a row
    while True:
        pending = [f for f in folders if f not in latest or latest[f].state != "finished"]
        for run in inspect_runs(pending):
            before = latest.get(run.folder, run)
            if before.state != run.state:
                log.info(f"{run.folder.name}: {run.state} {run.why}".rstrip())
            times_dead[run.folder] = times_dead[run.folder] + 1 if run.state == "died" else 0
            latest[run.folder] = run

        runs = [latest[folder] for folder in folders]
        # A network file system may show a record late: a run is dead when it was found so three times.
        is_active = any(run.state in ACTIVE_STATES or 0 < times_dead[run.folder] < 3 for run in runs)
        # Slurm did not answer.
        is_unclear = any(run.state == "unknown" and run.record.get("slurm_job") for run in runs)
        if not is_active and not is_unclear:
            return runs
        time.sleep(POLL_S)
