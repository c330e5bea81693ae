"""What every command-line program shares: Hydra composes, errors are shown, the exit code tells."""

import copy
import functools
import logging
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.plugins.sweeper import Sweeper
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from prefopt import UserError
from prefopt.config import NO_KEYS, ROOT, register
from prefopt.keys import Masked, key_in
from prefopt.paths import write_whole
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


class Composed(NamedTuple):
    """What Hydra makes of a multirun, for a program that starts the jobs itself; `folder` is that of the sweep."""

    points: list[Point]
    folder: Path


class Composer(Sweeper):
    """Gives the program all points of a multirun at once, as `Composed`.

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
        folder = Path(self.config.hydra.sweep.dir)
        write_whole(folder / "multirun.yaml", OmegaConf.to_yaml(self.config))
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
        self.program(Composed(points, folder))


Launch = Callable[[list[Point], Path, bool], int]


def program(
    config_name: str, launch: Launch | None = None
) -> Callable[[Callable[[DictConfig], None]], Callable[[], None]]:
    """Make a command-line program of a function that takes the composed config `conf/<config_name>.yaml`.

    A UserError becomes one message on stderr and exit code 2, any other exception a traceback and exit code 1.

    Of a multirun, where there is `launch`, Hydra only composes all points: launch(points, the sweep's folder, whether
    --dry-run was given) starts the jobs and returns the exit code. Otherwise the points run one after the other in this
    process; a failing one does not stop the others, and they are named at the end.
    """

    def decorate(job: Callable[[DictConfig], None]) -> Callable[[], None]:
        def main() -> None:
            failures: list[str] = []
            points: list[Point] = []
            folder = Path()
            code = 0

            def run(cfg: DictConfig | Composed) -> None:
                nonlocal code, points, folder
                if isinstance(cfg, Composed):
                    points, folder = cfg
                    return
                code = max(code, exit_code(lambda: job(cfg), failures), key=(0, EXIT_CODE, 2, 1).index)

            sys.stdout, sys.stderr = Masked(sys.stdout), Masked(sys.stderr)
            if found := key_in("\n".join(sys.argv)):
                sys.exit(f"error: the command line holds {found}. {NO_KEYS}")
            for client in ("httpx", "httpx2"):  # Hydra's root logger would show a line for each request to the hub
                logging.getLogger(client).setLevel(logging.WARNING)
            register()
            Plugins.instance().register(SweepFiles)
            if launch:  # Hydra takes plugins of the name space hydra_plugins alone, which belongs to no package
                Plugins.instance().class_name_to_class[BASIC_SWEEPER] = Composer
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
