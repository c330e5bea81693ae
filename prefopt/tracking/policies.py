"""The exported policies of a run, for the jobs that evaluate them."""

import glob
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from prefopt.config.schema import ModelConfig
from prefopt.errors import UserError
from prefopt.tracking.archive import last_step
from prefopt.tracking.record import record_of

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Checkpoint:
    """A model that can be loaded, and its name in results. `step`: of a run's policy, its optimizer steps. `weights`:
    the digest of its float32 weights, where its run has recorded that."""

    name: str
    model: ModelConfig
    step: int | None = None
    weights: str | None = None

    @property
    def path(self) -> str:
        return self.model.place


def runs_of(pattern: str) -> list[str]:
    """The folders of training runs that `run` names: one folder, or a pattern such as runs/*, of whose runs those that
    have finished; the others are named in the log. Raises UserError where there is none."""
    if Path(pattern).exists() or not glob.has_magic(pattern):
        return [pattern]
    folders = []
    for file in sorted(glob.glob(f"{pattern}/record.json")):  # noqa: PTH207  # pathlib takes no absolute pattern
        folder = str(Path(file).parent)
        try:
            record = record_of(folder)
        except UserError as error:
            log.warning(f"left out: {error}")
            continue
        if record["status"] == "finished":
            folders.append(folder)
        else:
            log.warning(f"left out: {folder} is {record['status']}; finish it: {record.get('command')}")
    if not folders:
        raise UserError(f"run={pattern} matches no finished run.")
    return folders


def each_run(config: T) -> list[T]:
    """A job's configuration for each of the runs that its `run` names (`runs_of`); for none, where `run` is null."""
    job: Any = config
    return [replace(job, run=run) for run in (runs_of(job.run) if job.run else [None])]


def exported_policies(run: str, which: str) -> list[Checkpoint]:
    """The policies in the folder `run`: with `which`="final" the finished one, with "all" also the earlier ones that
    `exports` has kept, in the order of their steps.

    Raises UserError where there is none.
    """
    record, folder = record_of(run), Path(run)
    model = ModelConfig(**record["config"]["model"])
    policies = []
    if which == "all":
        policies += [
            Checkpoint(path.name, model.exported(str(path)), int(path.name.removeprefix("step_")))
            for path in sorted((folder / "policies").glob("step_*"))
            if path.suffix != ".tmp"  # what a killed process was writing
        ]
    if (folder / "policy").is_dir():
        exported = model.exported(str(folder / "policy"))
        policies.append(Checkpoint("final", exported, last_step(record), record.get("final_weights")))
    if not policies:
        raise UserError(f"{folder} has no policy yet: it is {record['status']}. Finish it: {record.get('command')}")
    return policies
