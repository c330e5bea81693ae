"""Jobs as child processes of this machine."""

import os
import signal
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prefopt.config.hardware import resolve_hardware
from prefopt.launch.base import Launcher, SweepJob
from prefopt.launch.snapshot import python_environment
from prefopt.launch.warm import JobStarter
from prefopt.tracking.record import give_up
from prefopt.tracking.status import inspect_runs
from prefopt.training.config import TrainConfig
from prefopt.utils.console import echo


@dataclass(frozen=True)
class Local(Launcher):
    """Child processes on this machine, `at_once` at a time, each with one GPU where there are any."""

    at_once: int | None

    def __post_init__(self) -> None:
        if self.at_once is not None and self.at_once < 1:
            raise ValueError(f"at_once must be at least 1, or null, is {self.at_once}")

    def settle(self, config: TrainConfig) -> None:
        resolve_hardware(config)

    def resources(self, job: SweepJob) -> str:
        return job.hardware

    def device_memory_gib(self, config: TrainConfig) -> float | None:
        if not config.device.startswith("cuda"):
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30 / (self.at_once or 1)
        import torch

        return torch.cuda.get_device_properties(0).total_memory / 2**30

    def run(self, jobs: Sequence[SweepJob], code: Path, folder: Path) -> None:
        """Run the jobs; returns when all have ended.

        On Ctrl-C or SIGTERM the jobs are asked to save, and KeyboardInterrupt is raised when they have ended. On a
        second one they are killed.
        """
        gpus = visible_gpus()
        slots = list(range(self.at_once or len(gpus) or 1))
        env = os.environ | python_environment(code)
        if len(slots) > 1:  # else each job would take all cores for its threads
            env.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // len(slots))))
        waiting, running = deque(jobs), list[LocalProcess]()
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        starter = JobStarter(env, like=jobs[0].folder if len(jobs) > 1 else None)
        try:
            starter.wait()
            while waiting or running:
                while waiting and len(running) < len(slots):
                    slot = min(set(slots) - {child.slot for child in running})
                    gpu = {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if gpus else {}
                    running.append(LocalProcess(waiting.popleft(), slot, starter, gpu, alone=len(slots) == 1))
                running = [child for child in running if not child.ended()]
                time.sleep(0.05)
        except KeyboardInterrupt:
            for job in waiting:
                error = "the sweep was stopped before this job began"
                give_up(job.folder, (os.getpid(),), status="interrupted", error=error)
            self._stop(running)
            raise
        finally:
            starter.close()

    def _stop(self, running: "list[LocalProcess]") -> None:
        echo("stopping: the jobs save after their current step. Again to kill them.")
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


class LocalProcess:
    """A running job. What it writes into its log is also shown here, with the job's id unless it runs `alone`.

    It has its own session: a Ctrl-C reaches the launcher only, which asks the jobs to save, and a job outlives a
    launcher that is killed.
    """

    def __init__(self, job: SweepJob, slot: int, starter: JobStarter, gpu: dict[str, str], alone: bool):
        self.job, self.slot = job, slot
        self.prefix = "" if alone else f"{job.id} "
        echo(f"{job.id}: {job.label}")
        log = job.folder / "log.txt"
        log.touch()
        self.log = log.open(errors="replace")
        self.log.seek(0, os.SEEK_END)  # what earlier attempts have written is not shown again
        self.process = starter.start(job.folder, gpu)

    def ended(self) -> bool:
        """Show what is new in the log; whether the process has ended. Its record then says how, also after a kill."""
        code = self.process.poll()  # before the log is read, so that nothing of its end is missed
        for line in self.log:
            echo(f"{self.prefix}{line.rstrip()}")
        if code is None:
            return False
        self.log.close()
        (status,) = inspect_runs([self.job.folder])
        if status.state not in ("finished", "failed", "interrupted", "damaged"):
            how = f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
            error = f"the process ended before the run had finished: {how}"
            give_up(self.job.folder, (os.getpid(), self.process.pid), status="failed", error=error)
        return True


def visible_gpus() -> list[str]:
    """The GPUs that jobs may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [gpu for gpu in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if gpu]
    return [str(i) for i in range(torch.cuda.device_count())]
