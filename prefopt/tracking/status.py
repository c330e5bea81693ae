"""The state of runs as `prefopt runs` shows it: status, last metrics, why they ended."""

import itertools
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING
from rich.console import Group

from prefopt.errors import UserError
from prefopt.tracking.process import resolve_status, slurm_queue
from prefopt.tracking.record import NUMBER, WHOLE, all_tie, is_kind, read_record
from prefopt.utils.console import rows_table
from prefopt.utils.files import read_lines_reversed


@dataclass
class RunsConfig:
    """What `python -m prefopt.runs` reads (conf/runs.yaml)."""

    runs_dir: str = MISSING
    name: str = MISSING
    status: list[str] = field(default_factory=list)
    watch: bool = MISSING


HELDOUT = b'"split": "heldout"'  # as json.dumps writes it: lines without it need not be parsed


@dataclass
class RunStatus:
    """A run at a moment. `state` is one of `process.STATES`; `slurm` is Slurm's word for its job, if it has one."""

    folder: Path
    record: dict[str, Any]
    state: str
    slurm: str | None

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    @property
    def why(self) -> str:
        """Why it ended, in one line: the last line of the error, or of the log of a run that died; else ""."""
        if self.state == "damaged":
            return str(self.record["error"])
        if self.state in ("failed", "interrupted", "requeued"):
            return ((self.record.get("error") or "").strip().splitlines() or [""])[-1]
        if self.state == "died":
            lines = (line.decode(errors="replace").rstrip() for _, line in read_lines_reversed(self.log))
            last = next((line for line in lines if line), "empty")
            # The reason is often above the last line, which may be a launcher's.
            error = next((line for line in itertools.chain([last], lines) if "error" in line.lower()), last)
            slurm = f" (Slurm: {self.slurm or 'job gone'})" if self.record.get("slurm_job") else ""
            return f"ended without a word{slurm}; its log: {error}"
        return "cannot be asked from here" if self.state == "unknown" else ""

    def metrics(self) -> dict[str, Any]:
        """The last evaluation in metrics.jsonl, with the last step as `step`; {} before the first step. Of a finished
        run, what its record says."""
        if self.state == "finished" and self.record.get("evaluations"):
            row: dict[str, Any] = self.record["evaluations"][-1]
            return row
        last_step: dict[str, Any] = {}
        for _, line in read_lines_reversed(self.folder / "metrics.jsonl"):
            if last_step and HELDOUT not in line:
                continue
            try:
                row = json.loads(line)
            except ValueError:  # the line that is being written, or one that is damaged
                continue
            if not isinstance(row, dict) or not is_kind(row.get("step"), WHOLE):
                continue
            last_step = last_step or {"step": row["step"]}
            if row.get("split") == "heldout":
                return row | last_step
        return last_step

    @property
    def age_s(self) -> float:
        """Seconds since the run last wrote."""
        files = [self.folder / "record.json", self.folder / "metrics.jsonl"]
        return time.time() - max(file.stat().st_mtime for file in files if file.exists())


def inspect_runs(folders: list[Path]) -> list[RunStatus]:
    """The state of the runs in `folders`, in their order. Slurm is asked once, and only if one of them is its job."""
    records = [_read_or_damaged(folder) for folder in folders]
    queue = slurm_queue() if any(r.get("slurm_job") for r in records) else None
    return [
        RunStatus(folder, record, resolve_status(record, queue), (queue or {}).get(record.get("slurm_job") or ""))
        for folder, record in zip(folders, records, strict=True)
    ]


def _read_or_damaged(folder: Path) -> dict[str, Any]:
    """The record in `folder`. Of one that cannot be read, a record of the status damaged with the reason as its error:
    one such file keeps nobody from seeing the other runs."""
    try:
        return read_record(folder)
    except UserError as error:
        return {"status": "damaged", "error": str(error)}


def status_table(runs: list[RunStatus]) -> Group:
    """A row per run, and below the table why runs ended. Rewards have a column where some run has an oracle."""
    metrics_of = [run.metrics() for run in runs]
    keys = {"accuracy": "accuracy", "oracle_reward": "oracle reward", "kl": "KL"}
    if not any("oracle_reward" in metrics for metrics in metrics_of):
        del keys["oracle_reward"]
    headings = ("run", "status", "step", *keys.values(), "host", "age")
    rows = []
    for run, metrics in zip(runs, metrics_of, strict=True):
        record = run.record
        shown = metrics | ({"accuracy": None} if all_tie(metrics) else {})
        figures = [f"{shown[key]:.3f}" if is_kind(shown.get(key), NUMBER) else "–" for key in keys]
        where = record.get("slurm_job") and f"{record.get('host') or 'Slurm'} {record['slurm_job']}"
        rows.append(
            [
                run.folder.name,
                run.state,
                f"{metrics.get('step', '–')}/{record.get('config', {}).get('steps') or '?'}",
                *figures,
                where or record.get("host") or "–",
                age(run.age_s),
            ]
        )
    reasons = [f"{run.folder.name}: {run.why}" for run in runs if run.why]
    return rows_table(headings, rows, caption="\n".join(reasons))


def age(seconds: float) -> str:
    """A length of time in its largest unit: 3 d, 5 h, 7 min, 9 s."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def select(config: RunsConfig) -> list[RunStatus]:
    """The runs that the config asks for by `runs_dir`, `name` (with *) and `status`, sorted by name."""
    if config.name in ("", "..") or "/" in config.name:
        raise UserError(f"name={config.name} must be the name of a run's folder in runs_dir; * stands for anything")
    folders = sorted(file.parent for file in Path(config.runs_dir).glob(f"{config.name}/record.json"))
    return [run for run in inspect_runs(folders) if not config.status or run.state in config.status]
