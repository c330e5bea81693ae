"""Jobs of a sweep as Slurm job arrays, by a plain sbatch script.

Plain sbatch rather than submitit: jobs are frozen in files already, so a script of twenty lines is all there is left to
do, Slurm sees each job's own exit code (under submitit a job that raised is COMPLETED), and the job is asked to stop by
a flag that it looks at between steps instead of a handler that ends it anywhere.
"""

import json
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prefopt.errors import UserError
from prefopt.launch.base import Launcher, SweepJob
from prefopt.launch.estimate import parameters
from prefopt.launch.snapshot import python_environment
from prefopt.training.config import TrainConfig
from prefopt.utils.console import say
from prefopt.utils.files import atomic_write, write_json
from prefopt.utils.signals import EXIT_CODE


@dataclass(frozen=True)
class Slurm(Launcher):
    """See conf/launcher/slurm.yaml for what the fields mean."""

    partition: str | None
    account: str | None
    options: list[str]
    gpus: int
    nodes: int
    cpus: int
    hours: float
    hours_per_billion: float
    memory_gib: float
    memory_gib_per_billion: float
    at_once: int | None
    array_limit: int
    signal_s: int
    requeues: int
    setup: list[str]
    python: str | None

    def __post_init__(self) -> None:
        least = {"gpus": 0, "nodes": 1, "cpus": 1, "array_limit": 1, "signal_s": 1, "requeues": 0}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name} must be at least {value}, is {getattr(self, name)}")
        if self.at_once is not None and self.at_once < 1:
            raise ValueError(f"at_once must be at least 1, or null, is {self.at_once}")
        for name, given in {"partition": self.partition, "account": self.account}.items():
            if given is not None and not re.fullmatch(r"\w[\w.,+@-]*", given):
                raise ValueError(f"{name} must be of letters, digits and . , _ + @ - alone, is {given!r}")
        for option in self.options:
            if not re.fullmatch(r"--?\w[^\x00-\x1f\x7f]*", option):
                raise ValueError(f"options must each be one option of sbatch, such as --qos=long, and not {option!r}")
        if self.hours * 3600 < 2 * self.signal_s:
            raise ValueError(
                f"hours={self.hours:g} is too short for signal_s={self.signal_s}: a job would be asked to leave as "
                "soon as it has begun"
            )

    def settle(self, config: TrainConfig) -> None:
        if config.precision == "auto":
            raise UserError(
                "precision=auto asks the machine that trains, which is not this one. With launcher=slurm give "
                "precision=bfloat16 or precision=float32."
            )
        if config.device == "auto":
            config.device = "cuda" if self.gpus else "cpu"
        processes = max(1, self.gpus) * self.nodes
        if processes > 1 and config.engine.name == "single":
            raise UserError(
                f"launcher.gpus={self.gpus} and launcher.nodes={self.nodes} are {processes} processes, and engine="
                "single trains in one: add engine=zero2."
            )

    def limits(self, job: SweepJob) -> tuple[int, int]:
        """(time limit in minutes, memory per node in GiB) by the size of the job's model."""
        billions = parameters(job.model) / 1e9
        minutes = 60 * (self.hours + self.hours_per_billion * billions)
        return math.ceil(minutes), math.ceil(self.memory_gib + self.memory_gib_per_billion * billions)

    def resources(self, job: SweepJob) -> str:
        minutes, memory = self.limits(job)
        where = f"partition {self.partition}" if self.partition else "default partition"
        return (
            f"{where}, {self.nodes} node{'s' * (self.nodes > 1)}, {self.gpus} GPU, {self.cpus} CPU, {memory} GiB, "
            f"{minutes // 60}:{minutes % 60:02d} h"
        )

    def run(self, jobs: Sequence[SweepJob], code: Path, folder: Path) -> None:
        """Submit, and return. Jobs of one size share an array; where there is a cap on jobs at once, an array begins
        when the one before it has ended."""
        groups: dict[tuple[int, int], list[SweepJob]] = {}
        for job in jobs:
            groups.setdefault(self.limits(job), []).append(job)
        chunks = [
            (limits, group[i : i + self.array_limit])
            for limits, group in groups.items()
            for i in range(0, len(group), self.array_limit)
        ]
        before: str | None = None
        for number, (limits, chunk) in enumerate(chunks):
            listing = (folder / f"jobs_{number}.txt").resolve()
            for path in (listing, *(job.folder.resolve() for job in chunk)):
                if not str(path).isprintable():  # a line of the listing or of the script would be two
                    raise UserError(f"Slurm's files cannot name the folder {str(path)!r}: give another runs_dir.")
            atomic_write(listing, "".join(f"{job.folder.resolve()}\n" for job in chunk))
            script = listing.with_suffix(".sh")
            atomic_write(script, self.script(len(chunk), limits, listing, code))
            before = submit(script, before if self.at_once else None)
            for i, job in enumerate(chunk):
                frozen = json.loads((job.folder / "job.json").read_text())
                write_json(job.folder / "job.json", frozen | {"slurm_job": f"{before}_{i}"})
            say(f"Slurm job {before}: {len(chunk)} jobs ({script})")
        say("waiting for them; Ctrl-C leaves them to Slurm, and `python -m prefopt.runs` shows them")

    def script(self, count: int, limits: tuple[int, int], listing: Path, code: Path) -> str:
        """The job script of an array over the `count` run folders in the file `listing`.

        The processes get what torchrun would give them (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT), but
        srun starts them, so that each gets Slurm's signals itself. More than one node has never been tried.
        """
        minutes, memory = limits
        cap = f"%{self.at_once}" if self.at_once else ""
        options = [
            "--job-name=prefopt",
            f"--array=0-{count - 1}{cap}",
            f"--time={minutes}",
            f"--mem={memory}G",
            f"--nodes={self.nodes}",
            f"--ntasks-per-node={self.gpus or 1}",
            f"--cpus-per-task={self.cpus}",
            *([f"--gres=gpu:{self.gpus}"] if self.gpus else []),
            *([f"--partition={self.partition}"] if self.partition else []),
            *([f"--account={self.account}"] if self.account else []),
            f"--signal=USR2@{self.signal_s}",
            "--requeue",
            "--open-mode=append",
            f"--output={shlex.quote(str(listing.with_suffix('')))}_%a.out",
            *self.options,
        ]
        environment = python_environment(code)
        path = environment.pop("PYTHONPATH")
        python = shlex.split(self.python) if self.python else [sys.executable]
        return "\n".join(
            [
                "#!/bin/bash",
                *(f"#SBATCH {option}" for option in options),
                f'folder=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" {shlex.quote(str(listing))})',
                'exec >> "$folder/log.txt" 2>&1',
                "trap : TERM USR2  # they are for the processes below; this shell stays to requeue",
                *self.setup,
                f"export PYTHONPATH={shlex.quote(path)} {' '.join(f'{k}={v}' for k, v in environment.items())}",
                'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
                "export PREFOPT_SLURM_JOB=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID",
                "export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))",
                "srun --cpus-per-task=$SLURM_CPUS_PER_TASK --kill-on-bad-exit=1 bash -c \\",
                '    \'trap "" TERM USR2  # until Python takes them',
                '    RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID exec "$@"\' - \\',
                f'    {shlex.join(python)} -m prefopt.job "$folder"',
                "code=$?",
                "# A job that is being cancelled saves and leaves in the same way, and is no longer RUNNING.",
                f"if [ $code -eq {EXIT_CODE} ] && [ ${{SLURM_RESTART_COUNT:-0}} -lt {self.requeues} ] &&",
                '    [ "$(squeue --noheader --array --jobs=$PREFOPT_SLURM_JOB --format=%T)" = RUNNING ]; then',
                "    scontrol requeue $PREFOPT_SLURM_JOB",
                "fi",
                "exit $code",
                "",
            ]
        )


def submit(script: Path, after: str | None) -> str:
    """Hand a script to sbatch, to begin when job `after` has ended; the job's id. Raises UserError with what sbatch
    says where it refuses."""
    command = ["sbatch", "--parsable", *([f"--dependency=afterany:{after}"] if after else []), str(script)]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        raise UserError("launcher=slurm: there is no sbatch here. Run it on a machine that submits to Slurm.") from None
    except subprocess.CalledProcessError as error:
        raise UserError(f"sbatch refused {script}: {error.stderr.strip()}") from None
    return answer.strip().split(";")[0]
