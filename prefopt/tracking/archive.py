"""The records of finished runs, with those of the jobs that evaluated their policies: what every table and figure is
made of. They lie in the runs' folders, or, to be kept and passed on, in one file.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefopt.errors import UserError
from prefopt.tracking.record import load_record
from prefopt.utils.console import say
from prefopt.utils.files import atomic_write

Record = dict[str, Any]
# Of the machine and the moment: no figure depends on them, and they are nobody else's business.
MACHINE_KEYS = ("folder", "path", "code", "host", "pid", "pid_born", "slurm_job", "error")


def read_records(*places: Path) -> list[Record]:
    """Finished runs in these folders and archives (`write_archive`), by objective, beta and name; a run that lies in
    two of them once. `harness` and `alpaca` of each are the records of its evaluated policies. Says which are left out.

    Raises UserError if there is none.
    """
    records: dict[str, Record] = {}
    for place in places:
        for record in _archived(place) if place.is_file() else _in_folder(place):
            if record["status"] == "finished":
                records.setdefault(record["name"], record)
            else:
                say(f"left out: {place / record['name']} is {record['status']}; run it again: {record.get('command')}")
    if not records:
        folder = " ".join(map(str, places))
        raise UserError(f"no finished run in {folder}. Train one first: python -m prefopt.train runs_dir={folder}")
    return sorted(records.values(), key=lambda r: (r["objective"], beta(r) or 0.0, r["name"]))


def _in_folder(place: Path) -> list[Record]:
    found = []
    for file in sorted(place.glob("*/record.json")):
        record = load_record(file) | {"folder": str(file.parent)}
        for kind, pattern in (("harness", "harness/*.json"), ("alpaca", "alpaca/*/record.json")):
            own = sorted(file.parent.glob(pattern))
            record[kind] = [json.loads(each.read_text()) | {"file": str(each)} for each in own]
        found.append(record)
    return found


def _archived(file: Path) -> list[Record]:
    try:
        records = [json.loads(line) for line in file.read_text().splitlines()]
        return [record | {"harness": record["harness"], "alpaca": record["alpaca"]} for record in records]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} is no archive of records, which prefopt.report and prefopt.papers write: {error!r}"
        ) from None


def write_archive(records: Sequence[Record], file: Path) -> None:
    """A line per run, which `read_records` reads again: whoever has it can make every table and figure of these runs.
    Without what is the machine's own; paths below the current folder are relative to it."""
    here = f"{Path.cwd()}/"
    lines = []
    for record in records:
        kept = {key: value for key, value in record.items() if key not in MACHINE_KEYS}
        for kind in ("harness", "alpaca"):
            kept[kind] = [{k: v for k, v in told.items() if k not in MACHINE_KEYS} for told in record[kind]]
        lines.append(json.dumps(kept, ensure_ascii=False).replace(here, ""))
    atomic_write(file, "\n".join(lines) + "\n")


def write_archive_once(records: Sequence[Record], source: str | None, output: Path) -> list[Path]:
    """`write_archive` into `output`, unless `source`, where they were read from, is an archive already: its path, or
    none."""
    if not records or Path(source or "").suffix == ".jsonl":
        return []
    write_archive(records, output / "records.jsonl")
    return [output / "records.jsonl"]


def last_step(record: Record) -> int:
    """The optimizer steps behind the final policy: of an online run those of all stages."""
    step: int = record["evaluations"][-1]["step"] if record["evaluations"] else record["config"]["steps"]
    return step


def beta(record: Record) -> float | None:
    """The objective's beta, or that of its base where it wraps one."""
    objective = record["config"]["objective"]
    value = objective.get("beta", objective.get("base", {}).get("beta"))
    return None if value is None else float(value)
