"""record.json: read, checked, updated."""

import json
from pathlib import Path
from typing import Any

from prefopt.errors import UserError
from prefopt.utils.files import write_json


def load_record(file: Path) -> dict[str, Any]:
    """The record of a run, or of a job of a sweep. Raises UserError for a file that is none."""
    try:
        record = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read: {error}. Bring it back, or move its folder away.") from None
    if not isinstance(record, dict) or "status" not in record:
        raise UserError(f"{file} is no run's record: it has no status. Bring it back, or move its folder away.")
    return record


def read_record(folder: Path) -> dict[str, Any]:
    """record.json of a run's folder. What is queued in Slurm has its job's id in job.json: the submitter learns it
    when the job may already be writing its record."""
    list(folder.iterdir())  # on NFS this makes sure that the next line reads what another machine has renamed
    record = load_record(folder / "record.json")
    if record["status"] == "queued" and not record.get("slurm_job") and (folder / "job.json").is_file():
        record["slurm_job"] = json.loads((folder / "job.json").read_text()).get("slurm_job")
    return record


def update_record(folder: Path, **facts: object) -> None:
    """Merge `facts` into the record of a run that no other process writes."""
    record = json.loads((folder / "record.json").read_text())
    write_json(folder / "record.json", record | facts)


def record_of(run: str) -> dict[str, Any]:
    """The record of the run in that folder. Raises UserError for a folder that is none."""
    file = Path(run) / "record.json"
    if not file.is_file():
        raise UserError(f"run={run} is no run's folder: it holds no record.json")
    record = load_record(file)
    if not isinstance(record.get("config"), dict) or "model" not in record["config"]:
        raise UserError(f"run={run} is no training run: its record.json says of no model which it began from")
    return record
