"""Do what a sweep's submitter has frozen, as the launchers start it:

    python -m prefopt.job FOLDER

FOLDER/job.json holds the resolved config, and nothing is composed again. Exit code 0 means finished, 75 interrupted
(saved, and to be started again), anything else failed: the traceback is then on stderr and in record.json.
"""

import json
import sys
import traceback
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from prefopt.cli.program import exit_code
from prefopt.config.parse import parse
from prefopt.errors import Interrupted, UserError
from prefopt.evaluation.config import AlpacaConfig, HarnessConfig
from prefopt.tracking.process import here, hold
from prefopt.tracking.record import amend, read_record
from prefopt.training.config import OnlineConfig, TrainConfig
from prefopt.utils.distributed import is_first
from prefopt.utils.redact import Masked
from prefopt.utils.signals import listen


def run(folder: Path) -> None:
    """Raises UserError where another process works on it, or the data files are no longer those of the submission, and
    stop.Interrupted."""
    listen()  # before anything that takes seconds
    if is_first():
        hold(folder)
    if read_record(folder)["status"] == "finished":  # and its node was lost before Slurm knew of it
        return
    if is_first():
        amend(folder, status="running", **here())
    frozen = json.loads((folder / "job.json").read_text())
    try:
        (_train if frozen["program"] == "train" else _run_pending)(folder, frozen)
    except (Interrupted, KeyboardInterrupt):
        if frozen["program"] != "train":  # a training run has said so itself
            amend(folder, status="interrupted")
        raise
    except BaseException as error:  # SystemExit too: whatever ends a job before its end is a failure, and is kept
        amend(folder, status="failed", error=traceback.format_exc())
        if not isinstance(error, Exception):
            raise RuntimeError(f"{type(error).__name__} ended the job before it had finished") from error
        raise


def _train(folder: Path, frozen: dict[str, Any]) -> None:
    from prefopt.training.setup import plan, train

    planned = plan(parse(OmegaConf.create(frozen["config"]), TrainConfig))
    if planned.run.name != folder.name:
        raise UserError(
            f"{folder}: the data files have changed since this was submitted (they now belong to "
            f"{planned.run.name}). Bring them back, or submit the sweep again."
        )
    train(planned, command=frozen["command"], code=frozen["code"])


def _run_pending(folder: Path, frozen: dict[str, Any]) -> None:
    """Whatever of the job is not done yet."""
    schema: type[Any]
    match frozen["program"]:  # the other programs' modules need not be there, and take time to import
        case "online":
            from prefopt.training.online import go_on

            schema = OnlineConfig
        case "harness":
            from prefopt.evaluation.harness import go_on  # type: ignore[assignment]

            schema = HarnessConfig
        case "alpaca":
            from prefopt.evaluation.alpaca import go_on  # type: ignore[assignment]

            schema = AlpacaConfig
        case other:
            raise UserError(f"{folder}/job.json: there is no program {other!r} whose jobs can be run.")
    config: Any = parse(OmegaConf.create(frozen["config"]), schema)
    go_on(config, command=frozen["command"], code=frozen["code"])
    amend(folder, status="finished")


if __name__ == "__main__":
    sys.stdout, sys.stderr = Masked(sys.stdout), Masked(sys.stderr)
    sys.exit(exit_code(lambda: run(Path(sys.argv[1])), []))
