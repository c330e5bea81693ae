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
    """Raise UserError if the logger needs a package that is not there."""
    if config.wandb:
        try:
            import wandb  # noqa: F401
        except ImportError:
            raise UserError("logger=wandb needs the package wandb: pip install -e '.[wandb]'") from None


class Loggers:
    """Rows {"step", "split", metric: value}. Made anew for a run that goes on from step `start`, it forgets the rows
    that will come again. Of several processes only the first one writes."""

    def __init__(self, run: Run, config: LoggerConfig, start: int):
        self.wandb: Any = None
        if not is_main_process():
            self.file = Path(os.devnull).open("a")  # noqa: SIM115
            return
        self.file = run.metrics_file.open("a")
        self.file.truncate(_end(run.metrics_file, start) if start else 0)
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


def read_metrics(run: Run) -> Iterator[dict[str, Any]]:
    """The rows of metrics.jsonl; a last line that a killed process left half-written is passed over."""
    if not run.metrics_file.is_file():
        return
    with run.metrics_file.open() as file:
        for line in file:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                break


def _end(file: Path, step: int) -> int:
    """The length of the file up to the last row that is not from after `step`: rows come in the order of their steps,
    and a half-written one is the last."""
    lines = read_lines_reversed(file)
    next(lines, None)  # what follows the last line's end
    for place, line in lines:
        with contextlib.suppress(ValueError):
            if json.loads(line)["step"] <= step:
                return place + len(line) + 1
    return 0
