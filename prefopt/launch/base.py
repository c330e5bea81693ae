"""The interface of launchers, and the jobs that they start."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt.config.hardware import micro_batch_tokens
from prefopt.config.schema import ModelConfig
from prefopt.errors import UserError
from prefopt.tracking.process import ACTIVE_STATES
from prefopt.tracking.run import Run
from prefopt.training.config import TrainConfig


@dataclass
class SweepJob:
    """A point of a sweep that has passed all checks. Launchers start it as `python -m prefopt.job FOLDER`.

    `label` are the overrides that tell it from the other jobs. `model` is the one whose size decides its resources,
    where there is one. `folder` holds job.json, record.json and log.txt. A training run is `run`, whose folder it is,
    and `state` is that of the run before the sweep, one of `tracking.process.STATES`.
    """

    overrides: list[str]
    label: str
    config: Any
    model: ModelConfig | None
    folder: Path
    run: Run | None = None
    state: str = "new"

    @property
    def id(self) -> str:
        return self.run.id if self.run else self.folder.name

    @property
    def hardware(self) -> str:
        return f"{self.config.precision} on {self.config.device}"

    @property
    def to_run(self) -> bool:
        """Whether the sweep starts it. It does not start what may be running on a machine that cannot be asked."""
        return self.state not in ("finished", "unknown", *ACTIVE_STATES)


class Launcher(ABC):
    """Starts jobs, here or on a cluster. Its fields are the keys of conf/launcher/NAME.yaml."""

    def check(self) -> None:  # noqa: B027  # most launchers need nothing
        """Raise UserError where jobs cannot be started from this machine. Called before anything is written."""

    @abstractmethod
    def settle(self, config: TrainConfig) -> None:
        """Replace the `auto` values of a job's config by those of the machine that will run it.

        Raises UserError for a config that this launcher cannot run.
        """

    @abstractmethod
    def resources(self, job: SweepJob) -> str:
        """The hardware and the time that the job will get, in words."""

    @property
    def processes(self) -> int:
        """How many processes train a job together."""
        return 1

    def device_memory_gib(self, config: TrainConfig) -> float | None:
        """The memory of one device that a job trains on; None where it is not known."""
        return None

    @abstractmethod
    def run(self, jobs: Sequence[SweepJob], code: Path, folder: Path) -> None:
        """Start `jobs`, which have their job.json, with the package in `code`. `folder` is for the sweep's files."""


def configure_hardware(config: TrainConfig, launcher: Launcher) -> None:
    """Fill in device, precision and micro-batch size of a job's config (in place).

    Raises UserError for a particular GPU, and for what the launcher cannot run.
    """
    if config.device.startswith("cuda:"):
        raise UserError("device=cuda:N in a sweep: its launcher hands out the GPUs. Leave device=auto.")
    launcher.settle(config)
    config.micro_batch_tokens = config.micro_batch_tokens or micro_batch_tokens(config.device)
