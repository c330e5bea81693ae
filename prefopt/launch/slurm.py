"""Jobs of a sweep as Slurm job arrays, by a plain sbatch script.

Plain sbatch rather than submitit: jobs are frozen in files already, so a script of twenty lines is all there is left to
do, Slurm sees each job's own exit code (under submitit a job that raised is COMPLETED), and the job is asked to stop by
a flag that it looks at between steps instead of a handler that ends it anywhere.
"""

import json
import logging
import math
import os
import re
import shlex
import shutil
import string
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prefopt.errors import UserError
from prefopt.launch.base import Launcher, SweepJob
from prefopt.launch.estimate import parameters
from prefopt.launch.snapshot import python_environment
from prefopt.tracking.record import give_up
from prefopt.training.config import TrainConfig
from prefopt.utils.files import atomic_write, write_json
from prefopt.utils.signals import EXIT_CODE

log = logging.getLogger(__name__)


NO_SBATCH = "launcher=slurm: there is no sbatch here. Run it on a machine that submits to Slurm."
GPU_OPTIONS = ("gres", "gpus-per-node", "gpus")  # of sbatch: sites take one or another


class ScriptTemplate(string.Template):
    """Text with placeholders %%{NAME}: a script has $, @ and % of its own."""

    delimiter = "%%"


SCRIPT = ScriptTemplate(Path(__file__).with_suffix(".sh").read_text())


@dataclass(frozen=True)
class Slurm(Launcher):
    """See conf/launcher/slurm.yaml for what the fields mean."""

    partition: str | None
    account: str | None
    options: list[str]
    gpus: int
    gpu_type: str | None
    gpu_option: str
    gpu_memory_gib: float | None
    nodes: int
    cpus: int
    hours: float
    hours_per_billion: float
    memory_gib: float | None
    memory_gib_per_billion: float
    at_once: int | None
    array_limit: int
    signal_s: int
    requeues: int
    log_folder: str | None
    setup: list[str]
    python: str | None

    def __post_init__(self) -> None:
        least = {"gpus": 0, "nodes": 1, "cpus": 1, "array_limit": 1, "signal_s": 1, "requeues": 0}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name} must be at least {value}, is {getattr(self, name)}")
        if self.at_once is not None and self.at_once < 1:
            raise ValueError(f"at_once must be at least 1, or null, is {self.at_once}")
        if self.gpu_option not in GPU_OPTIONS:
            raise ValueError(f"gpu_option must be {' or '.join(GPU_OPTIONS)}, is {self.gpu_option!r}")
        names = {"partition": self.partition, "account": self.account, "gpu_type": self.gpu_type}
        for name, text in names.items():
            if text is not None and not re.fullmatch(r"\w[\w.,+@-]*", text):
                raise ValueError(f"{name} must be of letters, digits and . , _ + @ - alone, is {text!r}")
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
        if self.processes > 1 and config.engine.name == "single":
            raise UserError(
                f"launcher.gpus={self.gpus} and launcher.nodes={self.nodes} are {self.processes} processes, and engine="
                "single trains in one: add engine=fsdp or engine=zero2."
            )

    @property
    def processes(self) -> int:
        return max(1, self.gpus) * self.nodes

    def device_memory_gib(self, config: TrainConfig) -> float | None:
        return self.gpu_memory_gib if config.device.startswith("cuda") else None

    def check(self) -> None:
        if shutil.which("sbatch") is None:
            raise UserError(NO_SBATCH)

    def limits(self, job: SweepJob) -> tuple[int, int | None]:
        """(time limit in minutes, memory per node in GiB) by the size of the job's model. No memory: none is asked
        for."""
        billions = parameters(job.model) / 1e9
        minutes = 60 * (self.hours + self.hours_per_billion * billions)
        if self.memory_gib is None:
            return math.ceil(minutes), None
        return math.ceil(minutes), math.ceil(self.memory_gib + self.memory_gib_per_billion * billions)

    def resources(self, job: SweepJob) -> str:
        minutes, memory = self.limits(job)
        where = f"partition {self.partition}" if self.partition else "default partition"
        nodes = "1 node" if self.nodes == 1 else f"{self.nodes} nodes"
        gpus = f"{self.gpus} GPU" + (f" {self.gpu_type}" if self.gpu_type and self.gpus else "")
        room = "the site's memory" if memory is None else f"{memory} GiB"
        return f"{where}, {nodes}, {gpus}, {self.cpus} CPU, {room}, {minutes // 60}:{minutes % 60:02d} h"

    def run(self, jobs: Sequence[SweepJob], code: Path, folder: Path) -> None:
        """Submit, and return. Jobs of one size share an array; where there is a cap on jobs at once, an array begins
        when the one before it has ended.

        Raises UserError where sbatch refuses jobs, or cannot name their folders; those not submitted yet are then
        recorded as failed, with its words.
        """
        waiting = list(jobs)
        try:
            self._submit_all(waiting, code, folder)
        except UserError as error:
            for job in waiting:
                give_up(job.folder, (os.getpid(),), status="failed", error=str(error))
            raise
        log.info("waiting for them; Ctrl-C leaves them to Slurm, and `python -m prefopt.runs` shows them")

    def _submit_all(self, waiting: list[SweepJob], code: Path, folder: Path) -> None:
        """Submit the jobs in `waiting`, and take out of it what is submitted."""
        jobs = list(waiting)
        groups: dict[tuple[int, int | None], list[SweepJob]] = {}
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
            names = [slurm_name(job.run.name if job.run else job.label or job.id) for job in chunk]
            lines = zip((job.folder.resolve() for job in chunk), names, strict=True)
            atomic_write(listing, "".join(f"{place}\t{name}\n" for place, name in lines))
            script = listing.with_suffix(".sh")
            name = names[0] if len(chunk) == 1 else slurm_name(chunk[0].folder.resolve().parent.name)
            atomic_write(script, self.script(name, len(chunk), limits, listing, code))
            before = submit(script, before if self.at_once else None)
            for i, job in enumerate(chunk):
                frozen = json.loads((job.folder / "job.json").read_text())
                write_json(job.folder / "job.json", frozen | {"slurm_job": f"{before}_{i}"})
                waiting.remove(job)
            log.info(f"Slurm job {before}: {len(chunk)} jobs ({script})")

    def script(self, name: str, count: int, limits: tuple[int, int | None], listing: Path, code: Path) -> str:
        """The job script (slurm.sh) of an array over the `count` run folders that the file `listing` names, each with a
        tab and the name of the job. Until it begins, squeue shows `name`.

        `limits` are minutes and GiB per node; `code` is the folder whose package the jobs run. A process gets what
        torchrun would give it (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT). srun starts the processes, so
        that each gets Slurm's signals itself. They meet at the first node.
        """
        minutes, memory_gib = limits
        environment = python_environment(code)
        python_path = environment.pop("PYTHONPATH")
        python = shlex.split(self.python) if self.python else [sys.executable]

        gpus = None
        if self.gpus:
            count_of_option = self.gpus * (self.nodes if self.gpu_option == "gpus" else 1)
            gpus = ":".join(filter(None, [self.gpu_type, str(count_of_option)]))
            gpus = f"gpu:{gpus}" if self.gpu_option == "gres" else gpus
        memory = None if memory_gib is None else f"{memory_gib}G"
        wanted = {"mem": memory, self.gpu_option: gpus, "partition": self.partition, "account": self.account}
        resources = [f"--{name}={value}" for name, value in wanted.items() if value is not None]

        output = listing.with_suffix("")
        if self.log_folder is not None:
            output = Path(self.log_folder).expanduser().resolve() / f"{listing.parent.name}_{output.name}"
            output.parent.mkdir(parents=True, exist_ok=True)  # Slurm makes none, and ends the job

        return SCRIPT.substitute(
            name=name,
            last_task=count - 1,
            at_once=f"%{self.at_once}" if self.at_once else "",
            minutes=minutes,
            nodes=self.nodes,
            tasks_per_node=self.gpus or 1,
            cpus=self.cpus,
            # The next two and `setup` are any number of whole lines, none among them.
            resources="".join(f"#SBATCH {option}\n" for option in resources),
            options="".join(f"#SBATCH {option}\n" for option in self.options),
            signal_s=self.signal_s,
            output=shlex.quote(str(output)),
            listing=shlex.quote(str(listing)),
            setup="".join(f"{line}\n" for line in self.setup),
            python_path=shlex.quote(python_path),
            environment=" ".join(f"{name}={value}" for name, value in environment.items()),
            python=shlex.join(python),
            interrupted=EXIT_CODE,
            requeues=self.requeues,
        )


def slurm_name(text: str) -> str:
    """`text` as the name of a job in squeue."""
    return re.sub(r"[^\w.,+@=-]+", "_", text)[:100].strip("_") or "prefopt"


def submit(script: Path, after: str | None) -> str:
    """Hand a script to sbatch, to begin when job `after` has ended; the job's id. Raises UserError with what sbatch
    says where it refuses."""
    command = ["sbatch", "--parsable", *([f"--dependency=afterany:{after}"] if after else []), str(script)]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        raise UserError(NO_SBATCH) from None
    except subprocess.CalledProcessError as error:
        raise UserError(f"sbatch refused {script}: {error.stderr.strip()}") from None
    return answer.strip().split(";")[0]
