"""The records of finished runs and of the jobs that evaluated their policies. Every table and figure is made of them.

They lie in the runs' folders, or in one file, the archive, to be kept and passed on.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from prefopt.errors import UserError
from prefopt.tracking.metrics import metrics_damage
from prefopt.tracking.record import load_record, read_result, record_problems, result_problems
from prefopt.utils.files import atomic_write

log = logging.getLogger(__name__)

Record = dict[str, Any]
# The files of results by their kind, which is also the name of their folder in a run's.
RESULTS = {"harness": "*.json", **dict.fromkeys(("alpaca", "reward_bench", "mtbench", "arena"), "*/record.json")}
# Left out of an archive: no figure depends on them, and they tell of the user's machine.
MACHINE_KEYS = ("folder", "path", "code", "host", "pid", "pid_born", "slurm_job", "error")


def expand_glob(pattern: str) -> list[Path]:
    """The paths that match; where none does, the pattern itself, so that a message can name it."""
    path = Path(pattern)
    return sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor)))) or [path]


def read_records(*places: Path) -> list[Record]:
    """The finished runs in these folders and archives (`write_archive`), sorted by objective, beta and name.

    A run that lies in several places comes once. The keys of `RESULTS` in a record are lists: the records of its
    evaluated policies. Runs that have not finished are named on stderr. Raises UserError if none has.
    """
    records: dict[str, Record] = {}
    for place in places:
        for record in _archived(place) if place.is_file() else _in_folder(place):
            if record["status"] == "finished":
                records.setdefault(record["name"], record)
            else:
                run = record.get("folder", record.get("name"))
                log.warning(f"left out: {run} is {record['status']}; run it again: {record.get('command')}")
    if not records:
        folder = " ".join(map(str, places))
        raise UserError(f"no finished run in {folder}. Train one first: python -m prefopt.train runs_dir={folder}")
    return sorted(records.values(), key=lambda r: (r["objective"], beta(r) or 0.0, r["name"]))


def _in_folder(place: Path) -> list[Record]:
    records = []
    for file in sorted(place.glob("*/record.json")):
        try:
            record = load_record(file) | {"folder": str(file.parent)}
            if record["status"] == "finished":
                check_finished(file, record)
        except UserError as error:
            log.warning(f"left out: {error}")
            continue
        for kind in RESULTS:
            record[kind] = results_of(file.parent / kind, kind)
        records.append(record)
    return records


def check_finished(file: Path, record: Record) -> None:
    """Raise UserError where the record in `file` lacks what tables are made of, or its run's metrics are damaged."""
    if problem := next(record_problems(record, finished=True), None):
        raise UserError(f"{file} is no record of a finished run: {problem}. Bring it back.")
    metrics = file.with_name("metrics.jsonl")
    # A record that was copied without them stands for itself.
    if "metrics" in record and metrics.exists() and (why := metrics_damage(metrics, record["metrics"])):
        raise UserError(f"{file.parent}: {why}. Bring it back, or remove the folder and train again.")


def results_of(folder: Path, kind: str) -> list[Record]:
    """The results of a kind, of `RESULTS`, in their folder. One that is damaged is left out with a warning."""
    return [result for path in sorted(folder.glob(RESULTS[kind])) for result in _result(path, kind)]


def _result(file: Path, kind: str) -> list[Record]:
    """The result in `file`, or nothing, and a warning, where it is none."""
    try:
        result = read_result(file)
        if problem := next(result_problems(result, kind), None):
            raise UserError(f"{file} is no result: {problem}.")
    except UserError as error:
        log.warning(f"left out: {error} Remove it, and evaluate again.")
        return []
    return [result | {"file": str(file)}]


def _archived(file: Path) -> list[Record]:
    records: list[Record] = []
    try:
        for number, line in enumerate(file.read_text().splitlines(), start=1):
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError(f"line {number} is no record")
            for problem in (*record_problems(record, finished=True), *_results_problems(record)):
                raise ValueError(f"line {number}: {problem}")
            records.append({kind: [] for kind in RESULTS} | record)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{file} is no archive of records, which prefopt.report and prefopt.papers write: {error}"
        ) from None
    return records


def _results_problems(record: Record) -> Iterator[str]:
    for kind in RESULTS:
        results = record.get(kind, [])  # an archive does not name what its runs have none of
        if not isinstance(results, list):
            yield f"it has no list {kind}"
            continue
        for result in results:
            yield from (
                result_problems(result, kind) if isinstance(result, dict) else [f"a result in {kind} is no mapping"]
            )


def write_archive(records: Sequence[Record], file: Path) -> None:
    """Write a line per run, from which `read_records`, and so every table and figure of these runs, can be made again.

    The MACHINE_KEYS are left out. Paths below the current folder become relative to it.
    """
    current_folder = f"{Path.cwd()}/"
    lines = []
    for record in records:
        kept = {key: value for key, value in record.items() if key not in (*MACHINE_KEYS, *RESULTS)}
        for kind in RESULTS:
            if record[kind]:
                kept[kind] = [{k: v for k, v in result.items() if k not in MACHINE_KEYS} for result in record[kind]]
        lines.append(json.dumps(kept, ensure_ascii=False).replace(current_folder, ""))
    atomic_write(file, "\n".join(lines) + "\n")


def write_archive_once(records: Sequence[Record], source: str | None, output: Path) -> list[Path]:
    """Write the records into `output`/records.jsonl, unless `source`, from which they were read, is an archive itself.

    Returns the files that were written: one or none.
    """
    if not records or Path(source or "").suffix == ".jsonl":
        return []
    write_archive(records, output / "records.jsonl")
    return [output / "records.jsonl"]


def last_step(record: Record) -> int:
    """The number of optimizer steps of the final policy; of an online run, of all its stages together."""
    step: int = record["evaluations"][-1]["step"] if record["evaluations"] else record["config"]["steps"]
    return step


def beta(record: Record) -> float | None:
    """The objective's beta, or that of its base where it wraps one."""
    objective = record["config"]["objective"]
    value = objective.get("beta", objective.get("base", {}).get("beta"))
    return None if value is None else float(value)
