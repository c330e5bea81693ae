"""Sweeps: check every job, freeze it, have it run by a process of its own, and say what became of it.

    python -m prefopt.train -m objective=dpo,simpo objective.beta=0.01,0.1
    python -m prefopt.train -m launcher=slurm +sweep=objectives --dry-run

Hydra composes the points of the sweep and no more. One job that is refused refuses the sweep. Then a job's resolved
config goes into job.json in its run folder, and the package, as it is now, into a folder named by its content
(RUNS_DIR/code/DIGEST): the job runs that, whatever happens to YAMLs, branches and files meanwhile. `prefopt.job` runs
it; its output is in log.txt of the run folder.

The same command again skips what is finished, waits for what is under way, and runs the rest, from the last checkpoint
where there is one.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from hydra.core.hydra_config import HydraConfig
from rich.table import Table

from prefopt import UserError
from prefopt.config import PACKAGE, ModelConfig, TrainConfig, build, check, micro_batch_tokens, parse, resolve_hardware
from prefopt.liveness import UNDER_WAY, amend, here
from prefopt.paths import write_json, write_whole
from prefopt.program import Point, overrides
from prefopt.progress import say
from prefopt.ranks import world_size
from prefopt.runs import Look, console, look, table

if TYPE_CHECKING:
    from prefopt.run import Run

POLL_S = 3.0
T = TypeVar("T")


class Work(Protocol):
    """What a launcher starts: `python -m prefopt.job FOLDER`, after job.json has been written there. `label` is what
    tells it from the others of its sweep, and `model` the one by whose size it gets its resources."""

    label: str

    @property
    def id(self) -> str: ...
    @property
    def folder(self) -> Path: ...
    @property
    def model(self) -> ModelConfig: ...
    @property
    def hardware(self) -> str: ...


@dataclass
class Job:
    """A point of the sweep that has passed all checks. `state` is that of its run before the sweep (liveness.state)."""

    overrides: list[str]
    label: str
    config: TrainConfig
    run: "Run"
    state: str

    @property
    def to_run(self) -> bool:
        return self.state not in ("finished", "unknown", *UNDER_WAY)

    @property
    def id(self) -> str:
        return self.run.id

    @property
    def folder(self) -> Path:
        return self.run.folder

    @property
    def model(self) -> ModelConfig:
        return self.config.model

    @property
    def hardware(self) -> str:
        return f"{self.config.precision} on {self.config.device}"

    @property
    def intention(self) -> str:
        from prefopt.checkpoint import complete_checkpoints

        if not self.to_run:
            return {"finished": "finished", "unknown": f"left alone: may run on {self.run.record['host']}"}.get(
                self.state, f"{self.state}: waits for it"
            )
        checkpoint = max(complete_checkpoints(self.run.checkpoints), default=None)
        start = f"from step {int(checkpoint.name.removeprefix('step_'))}" if checkpoint else "from the start"
        return start if self.state == "new" else f"{self.state}: again {start}"


class Launcher(ABC):
    """Has jobs run somewhere. Its fields are the keys of conf/launcher/NAME.yaml."""

    @abstractmethod
    def settle(self, config: TrainConfig) -> None:
        """Put the hardware that the job will meet into its config. Raises UserError for what it cannot run."""

    @abstractmethod
    def resources(self, job: Work) -> str:
        """What the job will get, in words."""

    @abstractmethod
    def run(self, jobs: Sequence[Work], code: Path, folder: Path) -> None:
        """Start all `jobs`, which are frozen, on the code in `code`. Files of the sweep go into `folder`."""


@dataclass(frozen=True)
class Local(Launcher):
    """Child processes on this machine, `at_once` at a time, each with one GPU where there are any."""

    at_once: int | None

    def __post_init__(self) -> None:
        if self.at_once is not None and self.at_once < 1:
            raise ValueError(f"at_once must be at least 1, or null, is {self.at_once}")

    def settle(self, config: TrainConfig) -> None:
        resolve_hardware(config)

    def resources(self, job: Work) -> str:
        return job.hardware

    def run(self, jobs: Sequence[Work], code: Path, folder: Path) -> None:
        """Returns when all have ended. On Ctrl-C or SIGTERM the jobs are asked to save, and KeyboardInterrupt is
        raised when they have left; on a second one they are killed."""
        gpus = _gpus()
        slots = list(range(self.at_once or len(gpus) or 1))
        env = os.environ | python_environment(code)
        if len(slots) > 1:
            env.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // len(slots))))
        waiting, running = deque(jobs), list[_Child]()
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            while waiting or running:
                while waiting and len(running) < len(slots):
                    slot = min(set(slots) - {child.slot for child in running})
                    own = {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if gpus else {}
                    running.append(_Child(waiting.popleft(), slot, env | own, alone=len(slots) == 1))
                running = [child for child in running if not child.ended()]
                time.sleep(0.05)
        except KeyboardInterrupt:
            for job in waiting:
                amend(job.folder, status="interrupted", error="the sweep was stopped before this job began")
            self._stop(running)
            raise

    def _stop(self, running: "list[_Child]") -> None:
        say("stopping: the jobs save after their current step. Again to kill them.")
        try:
            for child in running:
                child.process.terminate()
            while running := [child for child in running if not child.ended()]:
                time.sleep(0.05)
        except KeyboardInterrupt:
            for child in running:
                child.process.kill()
                child.process.wait()
                child.ended()


class _Child:
    """A running job; what it writes into its log is shown here too. It has a session of its own: a Ctrl-C is not for
    it, and it outlives a launcher that is killed."""

    def __init__(self, job: Work, slot: int, env: dict[str, str], alone: bool):
        self.job, self.slot = job, slot
        self.prefix = "" if alone else f"{job.id} "
        say(f"{job.id}: {job.label}")
        log = job.folder / "log.txt"
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "prefopt.job", str(job.folder)],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self.log = log.open(errors="replace")
            self.log.seek(file.tell())

    def ended(self) -> bool:
        """Shows what is new in the log. A process that ended without saying so in its record failed."""
        code = self.process.poll()
        for line in self.log:
            say(f"{self.prefix}{line.rstrip()}")
        if code is None:
            return False
        self.log.close()
        (found,) = look([self.job.folder])
        if found.state not in ("finished", "failed", "interrupted"):
            how = f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
            amend(self.job.folder, status="failed", error=f"the process ended before the run had finished: {how}")
        return True


def launch(points: list[Point], folder: Path, dry_run: bool) -> int:
    """Run the jobs of a sweep; 0 when all have finished, else 1. With `dry_run` only the table of jobs is printed.

    Raises UserError, and starts nothing, where any job is refused.
    """
    if world_size() > 1:
        raise UserError("a sweep is started once, not by several processes (torchrun): its launcher starts the jobs.")
    if dry_run:
        return preview(points)
    launcher, jobs = plan_sweep(points)
    title = f"{len(jobs)} jobs, run folders in {jobs[0].config.runs_dir}"
    shown = Table("job", "run folder", "what happens", "resources", title=title, title_justify="left")
    for job in jobs:
        resources = launcher.resources(job) if job.to_run else "–"
        shown.add_row(job.label, job.folder.name, job.intention, resources)
    console().print(shown)
    if to_run := [job for job in jobs if job.to_run]:
        code = snapshot(Path(to_run[0].config.runs_dir) / "code")
        for job in to_run:
            freeze(job, code)
        launcher.run(to_run, code, folder)
    found = wait([job.folder for job in jobs])
    console().print(table(found))
    return verdict(found)


def verdict(found: list[Look]) -> int:
    """0 where all have finished; else 1, and why they have not on stderr."""
    bad = [each for each in found if each.state != "finished"]
    for each in bad:
        log = f"\n    {each.log}" if each.log.is_file() else ""
        print(f"{each.state}: {each.folder.name}: {each.why}{log}", file=sys.stderr)
    if bad:
        print(f"{len(bad)} of {len(found)} jobs have not finished; the same command tries them again", file=sys.stderr)
    return 1 if bad else 0


def refuse_launcher() -> None:
    """Raise UserError where a launcher was given to a program that was not asked for a sweep."""
    asked = HydraConfig.get()
    if asked.runtime.choices["launcher"] != "local" or any(o.startswith("launcher") for o in overrides()):
        raise UserError("a launcher is for a sweep: add -m, or leave `launcher` out. This one would be run here.")


def checked(
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


def plan_sweep(points: list[Point]) -> tuple[Launcher, list[Job]]:
    """The sweep's launcher, and its jobs; of several with one run folder, the first. Raises UserError that names every
    job that is refused."""
    launcher, found = checked(points, TrainConfig, plan_job)
    jobs: dict[Path, Job] = {}
    for each in found:
        jobs.setdefault(each.folder, each)
    look_at(list(jobs.values()))
    return launcher, list(jobs.values())


def look_at(jobs: list[Job]) -> None:
    """See what became of the jobs' runs before. All at once: Slurm is asked for all of its jobs, however many."""
    folders = {job.folder: job for job in jobs}
    for seen in look([folder for folder in folders if (folder / "record.json").is_file()]):
        folders[seen.folder].state = seen.state


def plan_job(point: Point, label: str, config: TrainConfig, launcher: Launcher) -> Job:
    """Raises UserError for a job that cannot be run, Lacking where it is only that something is not on this machine."""
    from prefopt.train import plan

    check(config)
    settle(config, launcher)
    return Job(point.overrides, label, config, plan(config).run, "new")


def settle(config: TrainConfig, launcher: Launcher) -> None:
    """`launcher.settle`, micro-batches that suit the device, and UserError for a GPU of one's own choice."""
    if config.device.startswith("cuda:"):
        raise UserError("device=cuda:N in a sweep: its launcher hands out the GPUs. Leave device=auto.")
    launcher.settle(config)
    config.micro_batch_tokens = config.micro_batch_tokens or micro_batch_tokens(config.device)


def preview(points: list[Point]) -> int:
    """Print what a sweep would do and, by estimate, take; 0. A model or data set that is not here yet is named below
    the table, and refuses nothing."""
    from prefopt.data.sources import Lacking
    from prefopt.estimate import GPU, Estimate, estimate
    from prefopt.objectives.base import Objective

    lacking: dict[str, None] = {}

    def planned(
        point: Point, label: str, config: TrainConfig, launcher: Launcher
    ) -> tuple[str, TrainConfig, Job | None]:
        try:
            return label, config, plan_job(point, label, config, launcher)
        except Lacking as error:
            lacking.update(dict.fromkeys(str(error).splitlines()))
            return label, config, None

    launcher, found = checked(points, TrainConfig, planned)
    look_at([job for _, _, job in found if job])
    title = f"{len(found)} jobs, run folders in {found[0][1].runs_dir}"
    headings = ("job", "run folder", "what happens", "resources", "GPU hours", "policies, GB")
    shown = Table(*headings, title=title, title_justify="left")
    estimates: list[Estimate] = []
    for label, config, job in found:
        cells, sizes = ["–", "waits for what is lacking", "–"], ["–", "–"]
        if job:
            cells = [job.folder.name, job.intention, launcher.resources(job) if job.to_run else "–"]
        if (job is None or job.to_run) and (size := estimate(config, build(config.objective, Objective, "objective"))):
            estimates.append(size)
            sizes = [f"{size.gpu_hours:.2g}", f"{size.policies_gb:.2g}"]
        shown.add_row(label, *cells, *sizes)
    hours, kept = sum(e.gpu_hours for e in estimates), sum(e.policies_gb for e in estimates)
    at_work = max((e.checkpoint_gb for e in estimates), default=0.0)
    shown.caption = (
        f"Estimates for {len(estimates)} jobs, without evaluations after training: {hours:.3g} GPU hours ({GPU}), "
        f"{kept:.3g} GB of policies, and up to {at_work:.2g} GB more for the checkpoint of each job under way."
    )
    shown.caption_justify = "left"
    console().print(shown)
    if lacking:
        print("\n".join(["lacking, before this can start:", *lacking]))
    return 0


def command_of(program: str, overrides: list[str]) -> str:
    """What does here, and alone, what a job of the sweep with these overrides does."""
    return f"python -m prefopt.{program} {shlex.join(o for o in overrides if not o.startswith('launcher'))}"


def freeze(job: Job, code: Path) -> None:
    """Write job.json, and the record as queued by this process."""
    command = command_of("train", job.overrides)
    frozen = {"config": dataclasses.asdict(job.config), "command": command, "code": str(code)}
    write_json(job.folder / "job.json", frozen)
    facts = {"command": command, "code": str(code), "error": None}
    job.run.update(status="queued", **facts | here() | {"slurm_job": None})


def snapshot(folder: Path) -> Path:
    """Copy this package, with commit and uncommitted changes, into `folder`/DIGEST, once; an absolute path."""
    from prefopt.run import ask_git, git

    files = [f for f in sorted(PACKAGE.rglob("*")) if f.is_file() and "__pycache__" not in f.parts]
    contents = {str(f.relative_to(PACKAGE.parent)): f.read_bytes() for f in files}
    contents["git.json"] = json.dumps(git()).encode()
    try:
        contents["changes.diff"] = ask_git("diff", "HEAD").encode()
    except (OSError, subprocess.CalledProcessError):  # not a checkout
        contents["changes.diff"] = b""
    digest = hashlib.sha256()
    for part in itertools.chain.from_iterable((name.encode(), content) for name, content in sorted(contents.items())):
        digest.update(len(part).to_bytes(8, "big") + part)
    target = (folder / digest.hexdigest()[:16]).resolve()
    if target.is_dir():
        return target
    aside = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    for name, content in contents.items():
        write_whole(aside / name, content)
    try:
        aside.rename(target)
    except OSError:  # another submitter was faster
        if not target.is_dir():
            raise
    return target


def python_environment(code: Path) -> dict[str, str]:
    """Variables with which `python -m prefopt.job` is that of `code`, and modules of the user's are found as before."""
    path = [str(code), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), str(Path.cwd())]
    return {"PYTHONPATH": os.pathsep.join(path), "PYTHONSAFEPATH": "1"}  # safe: the current folder does not come first


def wait(folders: list[Path]) -> list[Look]:
    """Until none of the runs is under way, with a line for every change. What is seen last.

    A run counts as dead when it has looked so three times: a file system may show a record late. One that has finished
    is not looked at again.
    """
    before: dict[Path, str] = {}
    dead = dict.fromkeys(folders, 0)
    seen: dict[Path, Look] = {}
    while True:
        seen |= {each.folder: each for each in look([f for f in folders if before.get(f) != "finished"])}
        found = [seen[folder] for folder in folders]
        for each in found:
            dead[each.folder] = dead[each.folder] + 1 if each.state == "died" else 0
            if before.get(each.folder, each.state) != each.state:
                say(f"{each.folder.name}: {each.state} {each.why}".rstrip())
            before[each.folder] = each.state
        asked = [each for each in found if each.state == "unknown" and each.record.get("slurm_job")]
        if not asked and not any(f.state in UNDER_WAY or 0 < dead[f.folder] < 3 for f in found):
            return found
        time.sleep(POLL_S)


def _gpus() -> list[str]:
    import torch

    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [gpu for gpu in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if gpu]
    return [str(i) for i in range(torch.cuda.device_count())]
