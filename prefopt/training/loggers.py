"""Where metrics go: metrics.jsonl always, wandb if asked for."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefopt.config.schema import LoggerConfig
from prefopt.errors import UserError
from prefopt.tracking.run import Run
from prefopt.utils.distributed import is_main_process
from prefopt.utils.files import read_lines_reversed


def check_logger(config: LoggerConfig) -> None:
    """Raise UserError where the logger's package is missing."""
    if config.wandb:
        try:
            import wandb  # noqa: F401
        except ImportError:
            raise UserError("logger=wandb needs the package wandb: pip install -e '.[wandb]'") from None


class Loggers:
    """Writes rows {"step", "split", metric: value}; only in the main process.

    A run that resumes from step `start` computes the rows after it again, so they are cut off here.
    """

    def __init__(self, run: Run, config: LoggerConfig, start: int):
        self.wandb: Any = None
        if not is_main_process():
            self.file = Path(os.devnull).open("a")  # noqa: SIM115  # `close` closes it
            return
        self.file = run.metrics_file.open("a")
        self.file.truncate(_end(run.metrics_file, start) if start else 0)
        if config.wandb:
            import wandb

            # One id for all attempts of a run: a resumed run adds to the same wandb run.
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


def read_metrics(run: Run) -> Iterator[dict[str, Any]]:
    """The rows of metrics.jsonl, without a last line that a killed process left half-written."""
    if not run.metrics_file.is_file():
        return
    with run.metrics_file.open() as file:
        for line in file:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                break


def _end(file: Path, step: int) -> int:
    """The length of the file, in bytes, up to and with the last row of `step` or before.

    It is read from its end: rows are in the order of their steps, and only the last one can be half-written.
    """
    lines = read_lines_reversed(file)
    next(lines, None)  # the empty or half-written rest after the last newline
    for offset, line in lines:
        with contextlib.suppress(ValueError):
            if json.loads(line)["step"] <= step:
                return offset + len(line) + 1
    return 0
