"""The points of a sweep, which Hydra composes and a launcher starts."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf


@dataclass
class Point:
    """A point of a sweep: its overrides and the config that they lead to."""

    overrides: list[str]
    cfg: DictConfig


SWEEP_FOLDER = "hydra.sweep.dir="


def files_of_groups(hydra: Any) -> dict[str, Any]:
    """{group: the content of the file that was chosen of it}, of Hydra's section of a composed config."""
    loader: Any = GlobalHydra.instance().config_loader()
    files = {}
    for group, choice in hydra.runtime.choices.items():
        if choice is None or "@" in group or group.startswith("hydra/"):
            continue
        file = loader.repository.load_config(f"{group}/{choice}")
        if file is not None and OmegaConf.is_dict(file.config):
            files[group] = OmegaConf.to_container(file.config, resolve=False)
    return files


def overrides() -> list[str]:
    """The overrides of the job that runs now, as they were typed."""
    # Not resolved: an interpolation in an override is one of the job's config, which is not Hydra's.
    task = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
    assert isinstance(task, list)
    return [str(override) for override in task]


def sweep_folder(cfg: DictConfig) -> Path:
    """A new folder for the files of a sweep: job scripts, and results that are no runs."""
    return Path(cfg.get("runs_dir", "runs")) / "multirun" / f"{time.strftime('%Y-%m-%d_%H-%M-%S')}-{os.getpid()}"
