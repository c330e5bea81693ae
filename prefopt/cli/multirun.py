"""The points of a sweep: composed by Hydra, handed over to a launcher."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf


@dataclass
class Point:
    """A point of a sweep: the overrides that lead to it, and its config."""

    overrides: list[str]
    cfg: DictConfig


SWEEP_FOLDER = "hydra.sweep.dir="


def overrides() -> list[str]:
    """What the command line of the job in hand changes, as it was typed: an interpolation in it means the job's config,
    and not Hydra's."""
    found = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
    assert isinstance(found, list)
    return [str(override) for override in found]


def sweep_folder(cfg: DictConfig) -> Path:
    """Where a sweep's job scripts and what its jobs leave besides their runs is kept."""
    return Path(cfg.get("runs_dir", "runs")) / "multirun" / f"{time.strftime('%Y-%m-%d_%H-%M-%S')}-{os.getpid()}"
