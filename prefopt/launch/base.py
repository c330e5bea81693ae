"""What a launcher is, and what it is given."""

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
    """A point of a sweep that has passed all checks, as launchers start it: `python -m prefopt.job FOLDER`.

    `label` tells it from the others of its sweep; `model` is the one by whose size it gets its resources. `folder`
    holds job.json, record.json and log.txt: that of its `run`, where it is a training run, whose `state` before the
    sweep is one of `tracking.process.STATES`.
    """

    overrides: list[str]
    label: str
    config: Any
    model: ModelConfig
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
        return self.state not in ("finished", "unknown", *ACTIVE_STATES)


class Launcher(ABC):
    """Has jobs run somewhere. Its fields are the keys of conf/launcher/NAME.yaml."""

    @abstractmethod
    def settle(self, config: TrainConfig) -> None:
        """Put the hardware that the job will meet into its config. Raises UserError for what it cannot run."""

    @abstractmethod
    def resources(self, job: SweepJob) -> str:
        """What the job will get, in words."""

    @abstractmethod
    def run(self, jobs: Sequence[SweepJob], code: Path, folder: Path) -> None:
        """Start all `jobs`, which are frozen, on the code in `code`. Files of the sweep go into `folder`."""


def configure_hardware(config: TrainConfig, launcher: Launcher) -> None:
    """`launcher.settle`, micro-batches that suit the device, and UserError for a GPU of one's own choice."""
    if config.device.startswith("cuda:"):
        raise UserError("device=cuda:N in a sweep: its launcher hands out the GPUs. Leave device=auto.")
    launcher.settle(config)
    config.micro_batch_tokens = config.micro_batch_tokens or micro_batch_tokens(config.device)
