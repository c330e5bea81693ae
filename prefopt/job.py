"""Do what a sweep's submitter has frozen, as the launchers start it:

    python -m prefopt.job FOLDER

FOLDER/job.json holds the resolved config, and nothing is composed again. Exit code 0 means finished, 75 interrupted
(saved, and to be started again), anything else failed: the traceback is then on stderr and in record.json.
"""

import json
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from prefopt import UserError
from prefopt.config import TrainConfig, parse
from prefopt.keys import Masked
from prefopt.liveness import amend, here, hold, read_record
from prefopt.program import exit_code
from prefopt.ranks import is_first
from prefopt.stop import Interrupted, listen


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
        if "program" in frozen:
            _other(folder, frozen)
        else:
            _train(folder, frozen)
    except (Interrupted, KeyboardInterrupt):
        if "program" in frozen:  # a training run has said so itself
            amend(folder, status="interrupted")
        raise
    except BaseException as error:  # SystemExit too: whatever ends a job before its end is a failure, and is kept
        amend(folder, status="failed", error=traceback.format_exc())
        if not isinstance(error, Exception):
            raise RuntimeError(f"{type(error).__name__} ended the job before it had finished") from error
        raise


def _train(folder: Path, frozen: dict[str, Any]) -> None:
    from prefopt.train import plan, train

    planned = plan(parse(OmegaConf.create(frozen["config"]), TrainConfig))
    if planned.run.name != folder.name:
        raise UserError(
            f"{folder}: the data files have changed since this was submitted (they now belong to "
            f"{planned.run.name}). Bring them back, or submit the sweep again."
        )
    train(planned, command=frozen["command"], code=frozen["code"])


def _other(folder: Path, frozen: dict[str, Any]) -> None:
    from prefopt.sweep import SCHEMAS

    config = parse(OmegaConf.create(frozen["config"]), SCHEMAS[frozen["program"]])
    go_on = import_module(f"prefopt.{frozen['program']}").go_on
    go_on(config, command=frozen["command"], code=frozen["code"])
    amend(folder, status="finished")


if __name__ == "__main__":
    sys.stdout, sys.stderr = Masked(sys.stdout), Masked(sys.stderr)
    sys.exit(exit_code(lambda: run(Path(sys.argv[1])), []))
