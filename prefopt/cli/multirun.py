"""The points of a sweep, which Hydra composes and a launcher starts."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf


@dataclass
class Point:
    """A point of a sweep: its overrides and the config that they lead to."""

    overrides: list[str]
    cfg: DictConfig


SWEEP_FOLDER = "hydra.sweep.dir="


def overrides() -> list[str]:
    """The overrides of the job that runs now, as they were typed."""
    # Not resolved: an interpolation in an override is one of the job's config, which is not Hydra's.
    task = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
    assert isinstance(task, list)
    return [str(override) for override in task]


def sweep_folder(cfg: DictConfig) -> Path:
    """A new folder for the files of a sweep: job scripts, and results that are no runs."""
    return Path(cfg.get("runs_dir", "runs")) / "multirun" / f"{time.strftime('%Y-%m-%d_%H-%M-%S')}-{os.getpid()}"
