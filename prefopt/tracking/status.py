"""What there is to see of runs: status, last metrics, why they ended."""

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
from prefopt.tracking.record import read_record
from prefopt.utils.console import rows_table
from prefopt.utils.files import read_lines_reversed


@dataclass
class RunsConfig:
    """What `python -m prefopt.runs` reads (conf/runs.yaml)."""

    runs_dir: str = MISSING
    name: str = MISSING
    status: list[str] = field(default_factory=list)
    watch: bool = MISSING
    best: str | None = None


HELDOUT = b'"split": "heldout"'  # as json.dumps writes it; what lacks it is not parsed


@dataclass
class RunStatus:
    """What there is to see of a run at a moment; `slurm` is the state of its Slurm job, where it has one."""

    folder: Path
    record: dict[str, Any]
    state: str
    slurm: str | None

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    @property
    def why(self) -> str:
        """One line on how it came to this: an error's last line, or what is left of a run that died."""
        if self.state in ("failed", "interrupted", "requeued"):
            return ((self.record.get("error") or "").strip().splitlines() or [""])[-1]
        if self.state == "died":
            said = (line.decode(errors="replace").rstrip() for _, line in read_lines_reversed(self.log))
            last = next((line for line in said if line), "empty")
            error = next((line for line in itertools.chain([last], said) if "error" in line.lower()), last)
            slurm = f" (Slurm: {self.slurm or 'job gone'})" if self.record.get("slurm_job") else ""
            return f"ended without a word{slurm}; its log: {error}"
        return "cannot be asked from here" if self.state == "unknown" else ""

    def metrics(self) -> dict[str, Any]:
        """The last step, and the last evaluation's main figures, read from the end of metrics.jsonl."""
        found: dict[str, Any] = {}
        for _, line in read_lines_reversed(self.folder / "metrics.jsonl"):
            if found and HELDOUT not in line:
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # the line that is being written
                continue
            found.setdefault("step", row["step"])
            if row["split"] == "heldout":
                return {**row, **found}
        return found

    @property
    def age_s(self) -> float:
        """Seconds since the run last wrote."""
        files = [self.folder / "record.json", self.folder / "metrics.jsonl"]
        return time.time() - max(file.stat().st_mtime for file in files if file.exists())


def inspect_runs(folders: list[Path]) -> list[RunStatus]:
    """Asks Slurm once, if any of the runs is one of its jobs."""
    records = [read_record(folder) for folder in folders]
    queue = slurm_queue() if any(r.get("slurm_job") for r in records) else None
    return [
        RunStatus(folder, record, resolve_status(record, queue), (queue or {}).get(record.get("slurm_job") or ""))
        for folder, record in zip(folders, records, strict=True)
    ]


def status_table(looks: list[RunStatus]) -> Group:
    headings = ("run", "status", "step", "accuracy", "oracle reward", "KL", "host", "age")
    rows = []
    for each in looks:
        metrics, record = each.metrics(), each.record
        figures = [f"{metrics[key]:.3f}" if key in metrics else "–" for key in ("accuracy", "oracle_reward", "kl")]
        where = record.get("slurm_job") and f"{record.get('host') or 'Slurm'} {record['slurm_job']}"
        rows.append(
            [
                each.folder.name,
                each.state,
                f"{metrics.get('step', '–')}/{record['config']['steps'] or '?'}",
                *figures,
                where or record.get("host") or "–",
                age(each.age_s),
            ]
        )
    reasons = [f"{each.folder.name}: {each.why}" for each in looks if each.why]
    return rows_table(headings, rows, caption="\n".join(reasons))


def age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def best(looks: list[RunStatus], key: str) -> Any:
    """The value of `key` in the run that ended with the highest oracle reward. Raises UserError where none has both, or
    some runs have not finished: the choice among the others would be another one later."""
    if unfinished := [each.folder.name for each in looks if each.state != "finished"]:
        raise UserError(f"best={key}: these runs have not finished: {', '.join(unfinished)}")
    found = []
    for each in looks:
        value: Any = each.record["config"]
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        rewards = [row["oracle_reward"] for row in each.record["evaluations"] if "oracle_reward" in row]
        if value is None or not rewards:
            raise UserError(f"best={key}: {each.folder} has no {key}, or was not evaluated by an oracle.")
        found.append((rewards[-1], value))
    if not found:
        raise UserError(f"best={key}: there are no such runs. Choose others by runs_dir, name and status.")
    return max(found, key=lambda pair: pair[0])[1]


def select(config: RunsConfig) -> list[RunStatus]:
    if config.name in ("", "..") or "/" in config.name:
        raise UserError(f"name={config.name} must be the name of a run's folder in runs_dir; * stands for anything")
    folders = sorted(file.parent for file in Path(config.runs_dir).glob(f"{config.name}/record.json"))
    return [each for each in inspect_runs(folders) if not config.status or each.state in config.status]
