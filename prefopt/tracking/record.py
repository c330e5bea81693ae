"""record.json of a run, or of a job of a sweep: the place that reads, checks and writes it."""

import json
from pathlib import Path
from typing import Any

from prefopt.errors import UserError
from prefopt.utils.files import refresh_nfs, write_json


def load_record(file: Path) -> dict[str, Any]:
    """The record of a run, or of a job of a sweep. Raises UserError for a file that is not a record."""
    try:
        record = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read: {error}. Bring it back, or move its folder away.") from None
    if not isinstance(record, dict) or "status" not in record:
        raise UserError(f"{file} is no run's record: it has no status. Bring it back, or move its folder away.")
    return record


def read_record(folder: Path) -> dict[str, Any]:
    """The newest record in a run's folder, also where another machine writes it. Raises UserError as `load_record`.

    A job that is queued in Slurm gets its `slurm_job` from job.json: the submitter learns the id after sbatch, when the
    job itself may be writing its record already.
    """
    refresh_nfs(folder)
    record = load_record(folder / "record.json")
    if record["status"] == "queued" and not record.get("slurm_job") and (folder / "job.json").is_file():
        record["slurm_job"] = json.loads((folder / "job.json").read_text()).get("slurm_job")
    return record


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Replace the record in `folder` in one step."""
    write_json(folder / "record.json", record)


def update_record(folder: Path, **facts: object) -> None:
    """Merge `facts` into the record of a run that no other process writes."""
    record = json.loads((folder / "record.json").read_text())
    write_record(folder, record | facts)


def record_of(run: str) -> dict[str, Any]:
    """The record of the training run in the folder `run`, as the user names it. Raises UserError for another folder."""
    file = Path(run) / "record.json"
    if not file.is_file():
        raise UserError(f"run={run} is no run's folder: it holds no record.json")
    record = load_record(file)
    if not isinstance(record.get("config"), dict) or "model" not in record["config"]:
        raise UserError(f"run={run} is no training run: its record.json says of no model which it began from")
    return record
