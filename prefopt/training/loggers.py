"""Where metrics go: metrics.jsonl always, wandb if asked for."""

import hashlib
import json
import logging
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefopt.config.schema import LoggerConfig, WandbConfig
from prefopt.errors import UserError
from prefopt.tracking.metrics import digest_of_beginning
from prefopt.tracking.run import Run
from prefopt.utils.distributed import is_main_process
from prefopt.utils.files import with_filename
from prefopt.utils.redact import redact

log = logging.getLogger(__name__)

INIT_SECONDS = 30  # until wandb's server must have answered


def check_logger(config: LoggerConfig) -> None:
    """Raise UserError where the logger's package or key is missing, or where the environment says of wandb what the
    config says otherwise."""
    if not config.wandb:
        return
    try:
        import wandb
    except ImportError:
        raise UserError("logger=wandb needs the package wandb: pip install -e '.[wandb]'") from None

    expected = {"WANDB_PROJECT": config.wandb.project, "WANDB_MODE": config.wandb.mode}
    others = [name for name, value in expected.items() if os.environ.get(name, value) != value]
    # A run has its own folder, name and id.
    others += [name for name in ("WANDB_DIR", "WANDB_NAME", "WANDB_RUN_ID", "WANDB_RESUME") if os.environ.get(name)]
    if others:
        said = ", ".join(f"{name}={os.environ[name]}" for name in others)
        raise UserError(
            f"the environment says {said}, which is not what logger.wandb says: unset it. Project and mode are "
            "logger.wandb.project and logger.wandb.mode; the files lie in the run's folder."
        )
    if config.wandb.mode == "online":
        try:
            problem = None if wandb.login(prompt=False, verify=False) else "there is none"
        except Exception as error:  # a key of the wrong form
            problem = str(error)
        if problem:
            raise UserError(
                f"logger.wandb.mode=online needs wandb's key: {redact(problem)}. Run `wandb login`, set WANDB_API_KEY, "
                "or take logger.wandb.mode=offline."
            )


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
            self.wandb = start_wandb(run, config.wandb)
            self._replay(run)

    def _replay(self, run: Run) -> None:
        """Give wandb the rows before this attempt that it lacks: an offline run starts anew with each attempt, and of
        a killed one the last rows may be missing."""
        for row in read_metrics(run):
            if self.wandb and row["step"] >= self.wandb.step:
                self._log_to_wandb(**row)

    def log(self, split: str, step: int, metrics: dict[str, Any]) -> None:
        line = (json.dumps({"step": step, "split": split, **metrics}) + "\n").encode()
        with with_filename(Path(self.file.name)):
            self.file.write(line)
            self.file.flush()
        self.digest.update(line)
        self.length += len(line)
        if self.wandb:
            self._log_to_wandb(split, step, **metrics)

    def _log_to_wandb(self, split: str, step: int, **metrics: Any) -> None:
        numbers = {f"{split}/{k}": value for k, value in metrics.items() if isinstance(value, int | float)}
        try:
            self.wandb.log(numbers, step=step)
        except Exception as error:  # training does not end for its logger
            log.warning(f"  wandb failed at step {step}, and gets no more rows; metrics.jsonl has them all: {error}")
            self.wandb = None

    def vouch(self) -> dict[str, Any]:
        """Flush metrics.jsonl to the disk. Returns its length in bytes and its SHA-256, as `metrics_damage` reads
        them."""
        if is_main_process():
            with with_filename(Path(self.file.name)):
                os.fsync(self.file.fileno())
        return {"length": self.length, "sha256": self.digest.hexdigest()}

    def close(self) -> None:
        self.file.close()
        if not self.wandb:
            return
        try:
            self.wandb.finish()
        except Exception as error:
            log.warning(f"  wandb could not be ended: {error}; metrics.jsonl has all rows")
        if self.wandb.offline:
            log.info(
                f"  wandb is offline; to upload this run: wandb sync {shlex.quote(str(Path(self.wandb.dir).parent))}"
            )


def start_wandb(run: Run, config: WandbConfig) -> Any:
    """wandb's run. Where wandb cannot be reached it is an offline one, and None where it does not start: a line says
    so."""
    import wandb

    settings: dict[str, Any] = {
        "project": config.project,
        "name": run.name,
        # One id for all attempts of a run: a resumed run adds to the same wandb run.
        "id": run.id,
        "resume": "allow",
        "dir": run.folder,
        "config": run.record["config"],
        "settings": wandb.Settings(silent=True, init_timeout=INIT_SECONDS),
    }
    try:
        return wandb.init(mode=config.mode, **settings)  # type: ignore[arg-type]  # checked with the config
    except Exception as error:
        reason = (redact(str(error)).strip() or type(error).__name__).splitlines()[0]
    if config.mode == "online":
        log.warning(f"  wandb cannot be reached, so its rows are kept offline in the run's folder: {reason}")
        try:
            wandb.teardown()  # its service process holds the run's id still
            return wandb.init(mode="offline", **settings)
        except Exception as error:
            reason = redact(str(error))
    log.warning(f"  wandb does not start, and gets no rows; metrics.jsonl has them all: {reason}")
    return None


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
