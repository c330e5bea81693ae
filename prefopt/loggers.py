"""Where metrics go: metrics.jsonl always, wandb if asked for."""

import json
import os
from pathlib import Path
from typing import Any

from prefopt import UserError
from prefopt.config import LoggerConfig
from prefopt.paths import write_whole
from prefopt.ranks import is_first
from prefopt.run import Run


def check_logger(config: LoggerConfig) -> None:
    """Raise UserError if the logger needs a package that is not there."""
    if config.wandb:
        try:
            import wandb  # noqa: F401
        except ImportError:
            raise UserError("logger=wandb needs the package wandb: pip install 'prefopt[wandb]'") from None


class Loggers:
    """Rows {"step", "split", metric: value}. Made anew for a run that goes on from step `start`, it forgets the rows
    that will come again. Of several processes only the first one writes."""

    def __init__(self, run: Run, config: LoggerConfig, start: int):
        self.wandb: Any = None
        if not is_first():
            self.file = Path(os.devnull).open("a")  # noqa: SIM115
            return
        kept = [row for row in read_metrics(run) if row["step"] <= start] if start else []
        write_whole(run.metrics_file, "".join(json.dumps(row) + "\n" for row in kept))
        self.file = run.metrics_file.open("a")
        if config.wandb:
            import wandb

            # One id for all the sittings of a run, so that a continued run goes on in the same place.
            self.wandb = wandb.init(
                project=config.wandb.project,
                mode=config.wandb.mode,  # type: ignore[arg-type]  # checked with the config
                name=run.name,
                id=run.id,
                resume="allow",
                dir=run.folder,
                config=run.record["config"],
                settings=wandb.Settings(silent=True),
            )

    def log(self, split: str, step: int, metrics: dict[str, Any]) -> None:
        self.file.write(json.dumps({"step": step, "split": split, **metrics}) + "\n")
        self.file.flush()
        if self.wandb:
            numbers = {f"{split}/{k}": value for k, value in metrics.items() if isinstance(value, int | float)}
            self.wandb.log(numbers, step=step)

    def close(self) -> None:
        self.file.close()
        if self.wandb:
            self.wandb.finish()


def read_metrics(run: Run) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; a last line that a killed process left half-written is passed over."""
    rows = []
    for line in run.metrics_file.read_text().splitlines() if run.metrics_file.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
