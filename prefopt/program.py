"""What every command-line program shares: Hydra composes, errors are shown, the exit code tells."""

import logging
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import hydra
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import DictConfig

from prefopt import UserError
from prefopt.config import ROOT, register
from prefopt.stop import EXIT_CODE, Interrupted


class SweepFiles(SearchPathPlugin):
    """Lets `+sweep=NAME` find sweeps/sweep/NAME.yaml, from whatever folder the program is called."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("prefopt", f"file://{ROOT / 'sweeps'}")


@dataclass
class Point:
    """A point of a sweep: the overrides that lead to it, and its config."""

    overrides: list[str]
    cfg: DictConfig


Launch = Callable[[list[Point], Path, bool], int]


def program(
    config_name: str, launch: Launch | None = None
) -> Callable[[Callable[[DictConfig], None]], Callable[[], None]]:
    """Make a command-line program of a function that takes the composed config `conf/<config_name>.yaml`.

    A UserError becomes one message on stderr and exit code 2, any other exception a traceback and exit code 1.

    A multirun composes all its points first. Where there is `launch`, Hydra only composes: launch(points, the sweep's
    folder, whether --dry-run was given) starts the jobs and returns the exit code. Otherwise the points run one after
    the other in this process; a failing one does not stop the others, and they are named at the end.
    """

    def decorate(job: Callable[[DictConfig], None]) -> Callable[[], None]:
        def main() -> None:
            failures: list[str] = []
            points: list[Point] = []
            folder = Path()
            code = 0

            def run(cfg: DictConfig) -> None:
                nonlocal code, folder
                asked = HydraConfig.get()
                if launch and asked.mode == RunMode.MULTIRUN:
                    folder = Path(asked.sweep.dir)
                    points.append(Point(list(asked.overrides.task), cfg))
                    return
                code = max(code, exit_code(lambda: job(cfg), failures), key=(0, EXIT_CODE, 2, 1).index)

            for client in ("httpx", "httpx2"):  # Hydra's root logger would show a line for each request to the hub
                logging.getLogger(client).setLevel(logging.WARNING)
            register()
            Plugins.instance().register(SweepFiles)
            if launch and any(argument.startswith("hydra/launcher") for argument in sys.argv):
                sys.exit("error: Hydra's own launchers are not used here; choose one by launcher=NAME (conf/launcher)")
            with tempfile.TemporaryDirectory() as scratch:
                dry_run = "--dry-run" in sys.argv
                if dry_run:
                    if not launch or not {"-m", "--multirun"} & set(sys.argv):
                        sys.exit("error: --dry-run shows the jobs of a sweep: python -m prefopt.train -m ... --dry-run")
                    # Hydra's sweeper writes a file before anything is launched.
                    sys.argv[sys.argv.index("--dry-run")] = f"hydra.sweep.dir={scratch}"
                try:
                    hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name=config_name)(run)()
                    if launch and points:
                        code = exit_code(lambda: launch(points, folder, dry_run), failures)
                except KeyboardInterrupt:
                    print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
                    sys.exit(130)
            if not points and (len(failures) > 1 or (failures and "-m" in sys.argv)):
                print("failed:", *failures, sep="\n  ", file=sys.stderr)
            sys.exit(code)

        return main

    return decorate


def exit_code(job: Callable[[], int | None], failures: list[str]) -> int:
    """Call `job`. What it raises is shown on stderr, and its first line added to `failures`: 2 for a UserError, 75 for
    a run that was asked to stop, 1 for any other exception. Otherwise what it returns, or 0."""
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
    except Exception as error:  # a fault of ours, or of the machine: shown whole
        traceback.print_exc()
        failures.append(_describe(error))
        return 1


def _describe(error: Exception) -> str:
    composed = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    job = " ".join(HydraConfig.get().overrides.task) if composed else ""
    message = (str(error) or type(error).__name__).splitlines()[0]
    return f"{job}: {message}"
