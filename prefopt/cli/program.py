"""What every command-line program shares: Hydra composes, errors are shown, the exit code tells."""

import errno
import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from prefopt.cli.help import show, wants_help
from prefopt.cli.hints import refusal
from prefopt.cli.multirun import SWEEP_FOLDER, Point, overrides, sweep_folder
from prefopt.config.parse import NO_KEYS, register
from prefopt.errors import Interrupted, UserError
from prefopt.utils.files import ROOT
from prefopt.utils.redact import RedactingStream, find_secret
from prefopt.utils.signals import EXIT_CODE

# What the system says of a disk that is full, read-only, forbidden, failing or gone.
STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE,
           errno.ENOTCONN, errno.ENODEV)  # fmt: skip
STORAGE_ADVICE = (
    "Make room there, or bring the disk or the rights back. What was done is kept; the same command goes on from it."
)
Launch = Callable[[list[Point], Path, bool], int]


def program(
    config_name: str, schema: type, launch: Launch | None = None
) -> Callable[[Callable[[DictConfig], None]], Callable[[], None]]:
    """Make a command-line program of a function that takes the config that
    `conf/<config_name>.yaml` composes into `schema`.

    A UserError, or a command line that Hydra cannot compose, becomes one message on stderr and exit code 2, any other
    exception a traceback and exit code 1.

    Of a multirun, where there is `launch`, Hydra only composes all points: launch(points, the sweep's folder, whether
    --dry-run was given) starts the jobs and returns the exit code. Otherwise the points run one after the other in this
    process; a failing one does not stop the others, and they are named at the end.
    """

    def decorate(job: Callable[[DictConfig], None]) -> Callable[[], None]:
        def main() -> None:
            failures: list[str] = []
            points: list[Point] = []
            code = 0

            def run(cfg: DictConfig | list[Point]) -> None:
                nonlocal code, points
                if isinstance(cfg, list):
                    points = cfg
                    return
                code = max(code, exit_code(lambda: job(cfg), failures), key=(0, EXIT_CODE, 2, 1).index)

            sys.stdout, sys.stderr = RedactingStream(sys.stdout), RedactingStream(sys.stderr)
            if found := find_secret("\n".join(sys.argv)):
                _refuse(f"the command line holds {found}. {NO_KEYS}")
            if wants_help(sys.argv[1:]):
                sys.exit(show(config_name, sys.argv[1:]))
            for client in ("httpx", "httpx2"):  # Hydra's root logger would show a line for each request to the hub
                logging.getLogger(client).setLevel(logging.WARNING)
            logging.getLogger("hydra.utils").setLevel(logging.CRITICAL)  # what it cannot import, it also raises
            os.environ["HYDRA_FULL_ERROR"] = (
                "1"  # Hydra raises what it cannot compose, and does not print it in its way
            )
            register(schema)
            if launch and any(argument.lstrip("+~").startswith("hydra/launcher") for argument in sys.argv):
                _refuse("Hydra's own launchers are not used here; choose one by launcher=NAME (conf/launcher)")
            if launch and any(argument.lstrip("+~").startswith("hydra/sweeper") for argument in sys.argv):
                _refuse("Hydra's own sweepers are not used here; a grid is key=VALUE,VALUE after -m")
            sweep, dry_run = bool({"-m", "--multirun"} & set(sys.argv)), "--dry-run" in sys.argv
            if dry_run and not (launch and sweep):
                _refuse("--dry-run shows the jobs of a sweep: python -m prefopt.train -m ... --dry-run")
            given = [argument.removeprefix(SWEEP_FOLDER) for argument in sys.argv if argument.startswith(SWEEP_FOLDER)]
            with tempfile.TemporaryDirectory() as scratch:
                if sweep:  # Hydra's sweeper writes a file before anything is composed
                    ours = [a for a in sys.argv if a != "--dry-run" and not a.startswith(SWEEP_FOLDER)]
                    sys.argv[:] = [*ours, f"{SWEEP_FOLDER}{scratch}"]
                try:
                    hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name=config_name)(run)()
                    if launch and points:
                        folder = Path(given[-1]) if given else sweep_folder(points[0].cfg)
                        code = exit_code(lambda: launch(points, folder, dry_run), failures)
                except KeyboardInterrupt:
                    print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
                    sys.exit(130)
                except Exception as error:  # of composing: what a job raises does not come this far
                    print(f"error: {refusal(error, sys.argv[1:])}", file=sys.stderr)
                    print(f"All groups and keys: python -m prefopt.{config_name} --help", file=sys.stderr)
                    sys.exit(2)
            if not points and (len(failures) > 1 or (failures and "-m" in sys.argv)):
                print("failed:", *failures, sep="\n  ", file=sys.stderr)
            sys.exit(code)

        return main

    return decorate


def exit_code(job: Callable[[], int | None], failures: list[str]) -> int:
    """Call `job`. What it raises is shown on stderr, and its first line added to `failures`: 2 for a UserError and
    for a disk that fails, 75 for a run that was asked to stop, 1 for any other exception. Otherwise what it returns,
    or 0."""
    try:
        return job() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        failures.append(_describe(error))
        return 2
    except Interrupted as error:
        print(f"interrupted: {error}; the same command goes on from there", file=sys.stderr)
        failures.append(_describe(error))
        return EXIT_CODE
    except Exception as error:
        failures.append(_describe(error))
        if isinstance(error, OSError) and error.errno in STORAGE:
            print(f"error: {error}. {STORAGE_ADVICE}", file=sys.stderr)
            return 2
        traceback.print_exc()  # a fault of ours, or of the machine: shown whole
        return 1


def _refuse(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def _describe(error: Exception) -> str:
    composed = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    job = " ".join(overrides()) if composed else ""
    message = (str(error) or type(error).__name__).splitlines()[0]
    return f"{job}: {message}"


def require_multirun() -> None:
    """Raise UserError where a launcher was given to a program that was not asked for a sweep."""
    asked = HydraConfig.get()
    if asked.runtime.choices["launcher"] != "local" or any(o.startswith("launcher") for o in overrides()):
        raise UserError("a launcher is for a sweep: add -m, or leave `launcher` out. This one would be run here.")
