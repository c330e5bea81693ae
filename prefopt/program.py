"""What every command-line program shares: Hydra composes, errors are shown, the exit code tells."""

import copy
import errno
import functools
import logging
import os
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.plugins.sweeper import Sweeper
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from prefopt import UserError
from prefopt.config import NO_KEYS, ROOT, register, unknown_key
from prefopt.keys import Masked, key_in
from prefopt.stop import EXIT_CODE, Interrupted

BASIC_SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"


class SweepFiles(SearchPathPlugin):
    """Lets `+sweep=NAME` find sweeps/sweep/NAME.yaml, from whatever folder the program is called."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("prefopt", f"file://{ROOT / 'sweeps'}")


@dataclass
class Point:
    """A point of a sweep: the overrides that lead to it, and its config."""

    overrides: list[str]
    cfg: DictConfig


class Composer(Sweeper):
    """Gives a program that starts its jobs itself all points of a multirun at once.

    Hydra's own sweeper composes every point twice, from all its files, at 0.1 s each time. Points that choose the same
    files (objective=dpo) differ in values alone: they are composed once, and each has its values put into a copy.
    """

    def __init__(self, max_batch_size: int | None, params: dict[str, str] | None):
        self.params = [f"{key}={values}" for key, values in (params or {}).items()]

    def setup(self, *, hydra_context: Any, task_function: Any, config: DictConfig) -> None:
        self.loader, self.program = hydra_context.config_loader, task_function
        self.config: Any = config

    def sweep(self, arguments: list[str]) -> None:
        given = OverridesParser.create(config_loader=self.loader).parse_overrides([*self.params, *arguments])
        (grid,) = BasicSweeper.split_arguments(given, None)
        parsed = functools.cache(OverridesParser.create().parse_override)
        is_group = functools.cache(self.loader.repository.group_exists)
        composed: dict[tuple[str, ...], DictConfig] = {}
        points = []
        for overrides in grid:
            values = [o for o in map(parsed, overrides) if isinstance(o.value(), dict) or not is_group(o.key_or_group)]
            files = tuple(text for text in overrides if parsed(text) not in values)
            if files not in composed:
                composed[files] = self.loader.load_sweep_config(self.config, list(files))
                with open_dict(composed[files]):
                    del composed[files]["hydra"]
            cfg = copy.deepcopy(composed[files])
            self.loader._apply_overrides_to_config(values, cfg)
            points.append(Point(overrides, cfg))
        self.program(points)


# What the system says of a disk that is full, read-only, forbidden, failing or gone.
STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE,
           errno.ENOTCONN, errno.ENODEV)  # fmt: skip
STORAGE_ADVICE = (
    "Make room there, or bring the disk or the rights back. What was done is kept; the same command goes on from it."
)
SWEEP_FOLDER = "hydra.sweep.dir="
Launch = Callable[[list[Point], Path, bool], int]


def program(
    config_name: str, launch: Launch | None = None
) -> Callable[[Callable[[DictConfig], None]], Callable[[], None]]:
    """Make a command-line program of a function that takes the composed config `conf/<config_name>.yaml`.

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

            sys.stdout, sys.stderr = Masked(sys.stdout), Masked(sys.stderr)
            if found := key_in("\n".join(sys.argv)):
                sys.exit(f"error: the command line holds {found}. {NO_KEYS}")
            for client in ("httpx", "httpx2"):  # Hydra's root logger would show a line for each request to the hub
                logging.getLogger(client).setLevel(logging.WARNING)
            logging.getLogger("hydra.utils").setLevel(logging.CRITICAL)  # what it cannot import, it also raises
            os.environ["HYDRA_FULL_ERROR"] = (
                "1"  # Hydra raises what it cannot compose, and does not print it in its way
            )
            register()
            Plugins.instance().register(SweepFiles)
            if launch:  # Hydra takes plugins of the name space hydra_plugins alone, which belongs to no package
                Plugins.instance().class_name_to_class[BASIC_SWEEPER] = Composer
            if launch and any(argument.startswith("hydra/launcher") for argument in sys.argv):
                sys.exit("error: Hydra's own launchers are not used here; choose one by launcher=NAME (conf/launcher)")
            sweep, dry_run = bool({"-m", "--multirun"} & set(sys.argv)), "--dry-run" in sys.argv
            if dry_run and not (launch and sweep):
                sys.exit("error: --dry-run shows the jobs of a sweep: python -m prefopt.train -m ... --dry-run")
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
                    print(f"error: {_refusal(error)}", file=sys.stderr)
                    print(f"All groups and keys: python -m prefopt.{config_name} --help", file=sys.stderr)
                    sys.exit(2)
            if not points and (len(failures) > 1 or (failures and "-m" in sys.argv)):
                print("failed:", *failures, sep="\n  ", file=sys.stderr)
            sys.exit(code)

        return main

    return decorate


def overrides() -> list[str]:
    """What the command line of the job in hand changes, as it was typed: an interpolation in it means the job's config,
    and not Hydra's."""
    found = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
    assert isinstance(found, list)
    return [str(override) for override in found]


def sweep_folder(cfg: DictConfig) -> Path:
    """Where a sweep's job scripts and what its jobs leave besides their runs is kept."""
    return Path(cfg.get("runs_dir", "runs")) / "multirun" / f"{time.strftime('%Y-%m-%d_%H-%M-%S')}-{os.getpid()}"


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


def _refusal(error: Exception) -> str:
    """What keeps Hydra from composing, without its advice: to add a key with a plus, which the schema would refuse."""
    cause = error.__cause__
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and cause.parent_node is not None:
        known, key = [str(key) for key in cause.parent_node], cause.full_key
        return unknown_key(str(key), known) if known else f"{key} is not there yet; add it with a plus: +{key}=VALUE"
    if not isinstance(error, HydraException):  # it does not say what it is about
        return f"{error or type(error).__name__} (in {shlex.join(sys.argv[1:])})"
    message = str(error).partition("Config search path:")[0].strip()
    return f"{message}: {str(cause).splitlines()[0]}" if isinstance(cause, OmegaConfBaseException) else message


def _describe(error: Exception) -> str:
    composed = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    job = " ".join(overrides()) if composed else ""
    message = (str(error) or type(error).__name__).splitlines()[0]
    return f"{job}: {message}"
