"""Where metrics go: metrics.jsonl always, wandb if asked for."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefopt.config.schema import LoggerConfig
from prefopt.errors import UserError
from prefopt.tracking.metrics import digest_of_beginning
from prefopt.tracking.run import Run
from prefopt.utils.distributed import is_main_process
from prefopt.utils.files import with_filename


def check_logger(config: LoggerConfig) -> None:
    """Raise UserError where the logger's package is missing."""
    if config.wandb:
        try:
            import wandb  # noqa: F401
        except ImportError:
            raise UserError("logger=wandb needs the package wandb: pip install -e '.[wandb]'") from None


class Loggers:
    """Writes rows {"step", "split", metric: value}; only in the main process.

    `vouched` is what the checkpoint from which a run resumes says of metrics.jsonl (`vouch`), and None at the start of
    a run. The rows after it are computed again, so they are cut off here. `metrics_damage` has passed the file.
    """

    def __init__(self, run: Run, config: LoggerConfig, vouched: dict[str, Any] | None):
        self.wandb: Any = None
        self.digest = hashlib.sha256()
        self.length = 0
        if not is_main_process():
            self.file = Path(os.devnull).open("ab")  # noqa: SIM115  # `close` closes it
            return
        self.file = run.metrics_file.open("ab")
        if vouched:
            self.length = vouched["length"]
            self.digest = digest_of_beginning(run.metrics_file, self.length)
        self.file.truncate(self.length)
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
        line = (json.dumps({"step": step, "split": split, **metrics}) + "\n").encode()
        with with_filename(Path(self.file.name)):
            self.file.write(line)
            self.file.flush()
        self.digest.update(line)
        self.length += len(line)
        if self.wandb:
            numbers = {f"{split}/{k}": value for k, value in metrics.items() if isinstance(value, int | float)}
            self.wandb.log(numbers, step=step)

    def vouch(self) -> dict[str, Any]:
        """Flush metrics.jsonl to the disk. Returns its length in bytes and its SHA-256, as `metrics_damage` reads
        them."""
        if is_main_process():
            with with_filename(Path(self.file.name)):
                os.fsync(self.file.fileno())
        return {"length": self.length, "sha256": self.digest.hexdigest()}

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
