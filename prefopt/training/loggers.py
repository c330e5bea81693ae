"""Where metrics go: metrics.jsonl always, and a CSV file, TensorBoard and wandb if asked for."""

import csv
import hashlib
import importlib.util
import io
import json
import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from prefopt.config.schema import LoggerConfig
from prefopt.errors import UserError
from prefopt.tracking.metrics import digest_of_beginning, numbers, read_metrics
from prefopt.tracking.run import Run
from prefopt.training.wandb_logger import WandbLogger, check_wandb
from prefopt.utils.distributed import is_main_process
from prefopt.utils.files import atomic_write, with_filename

log = logging.getLogger(__name__)


class Logger(Protocol):
    """A copy of metrics.jsonl for another program. When it is made it brings itself up to date: it then holds each row
    of the file once, whatever an attempt before has left."""

    def log(self, split: str, step: int, metrics: dict[str, Any]) -> None:
        """Take a row, which is in metrics.jsonl already."""

    def close(self) -> None: ...


def check_logger(config: LoggerConfig) -> None:
    """Raise UserError where a logger's package or key is missing, or where the environment says of wandb what the
    config says otherwise."""
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError("logger.tensorboard needs the package tensorboard: pip install -e '.[tensorboard]'")
    if config.wandb:
        check_wandb(config.wandb)


class Loggers:
    """Writes rows {"step", "split", metric: value}; only in the main process.

    `vouched` is what the checkpoint from which a run resumes says of metrics.jsonl (`vouch`), and None at the start of
    a run. The rows after it are computed again, so they are cut off here. `metrics_damage` has passed the file.

    Training does not end for another logger than metrics.jsonl: one that fails gets no more rows, and a line says so.
    """

    def __init__(self, run: Run, config: LoggerConfig, vouched: dict[str, Any] | None):
        self.others: dict[str, Logger] = {}
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
        self._start_others(run, config)

    def _start_others(self, run: Run, config: LoggerConfig) -> None:
        asked_for: dict[str, Callable[[], Logger]] = {}
        if config.csv:
            asked_for["csv"] = partial(CsvLogger, run)
        if config.tensorboard:
            asked_for["tensorboard"] = partial(TensorBoardLogger, run)
        if config.wandb:
            asked_for["wandb"] = partial(WandbLogger, run, config.wandb)
        for name, start in asked_for.items():
            try:
                self.others[name] = start()
            except Exception as error:
                log.warning(f"  {name} does not start, and gets no rows; metrics.jsonl has them all: {error}")

    def log(self, split: str, step: int, metrics: dict[str, Any]) -> None:
        line = (json.dumps({"step": step, "split": split, **metrics}) + "\n").encode()
        with with_filename(Path(self.file.name)):
            self.file.write(line)
            self.file.flush()
        self.digest.update(line)
        self.length += len(line)
        for name, other in list(self.others.items()):
            try:
                other.log(split, step, metrics)
            except Exception as error:
                log.warning(
                    f"  {name} failed at step {step}, and gets no more rows; metrics.jsonl has them all: {error}"
                )
                del self.others[name]

    def vouch(self) -> dict[str, Any]:
        """Flush metrics.jsonl to the disk. Returns its length in bytes and its SHA-256, as `metrics_damage` reads
        them."""
        if is_main_process():
            with with_filename(Path(self.file.name)):
                os.fsync(self.file.fileno())
        return {"length": self.length, "sha256": self.digest.hexdigest()}

    def close(self) -> None:
        self.file.close()
        for name, other in self.others.items():
            try:
                other.close()
            except Exception as error:
                log.warning(f"  {name} could not be ended: {error}; metrics.jsonl has all rows")


class CsvLogger:
    """metrics.csv in the run's folder: a column for each metric that is a number, empty where a row lacks it."""

    def __init__(self, run: Run):
        self.source, self.file = run.metrics_file, run.folder / "metrics.csv"
        self._write_anew()

    def log(self, split: str, step: int, metrics: dict[str, Any]) -> None:
        row = {"step": step, "split": split, **numbers(metrics)}
        if row.keys() - set(self.columns):  # a row is as wide as the head, so another column is one in all rows
            self._write_anew()
            return
        with self.file.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(row)

    def _write_anew(self) -> None:
        rows = [{"step": r["step"], "split": r["split"], **numbers(r)} for r in read_metrics(self.source)]
        self.columns = list(dict.fromkeys(["step", "split", *(key for row in rows for key in row)]))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns)
        writer.writeheader()
        writer.writerows(rows)
        atomic_write(self.file, text.getvalue())

    def close(self) -> None:
        pass


class TensorBoardLogger:
    """tensorboard/ in the run's folder: a curve train/METRIC or heldout/METRIC for each metric that is a number."""

    def __init__(self, run: Run):
        from torch.utils.tensorboard import SummaryWriter

        folder = run.folder / "tensorboard"
        for file in folder.glob("events.out.tfevents.*"):  # of an attempt before
            file.unlink()
        self.writer = SummaryWriter(str(folder), flush_secs=10)
        for row in read_metrics(run.metrics_file):
            self.log(row["split"], row["step"], row)

    def log(self, split: str, step: int, metrics: dict[str, Any]) -> None:
        for name, value in numbers(metrics).items():
            self.writer.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        self.writer.close()
