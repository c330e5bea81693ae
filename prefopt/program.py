"""What every command-line program shares: Hydra composes, errors are shown, the exit code tells."""

import logging
import sys
import traceback
from collections.abc import Callable

import hydra
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import DictConfig

from prefopt import UserError
from prefopt.config import ROOT, register


class SweepFiles(SearchPathPlugin):
    """Lets `+sweep=NAME` find sweeps/sweep/NAME.yaml, from whatever folder the program is called."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("prefopt", f"file://{ROOT / 'sweeps'}")


def program(config_name: str) -> Callable[[Callable[[DictConfig], None]], Callable[[], None]]:
    """Make a command-line program of a function that takes the composed config `conf/<config_name>.yaml`.

    A UserError becomes one message on stderr and exit code 2, any other exception a traceback and exit code 1. In a
    multirun a failing job does not stop the others; they are named at the end, and the exit code is that of the worst.
    """

    def decorate(job: Callable[[DictConfig], None]) -> Callable[[], None]:
        def main() -> None:
            failures: list[str] = []
            code = 0

            def run(cfg: DictConfig) -> None:
                nonlocal code
                try:
                    job(cfg)
                except UserError as error:
                    print(f"error: {error}", file=sys.stderr)
                    code = code or 2
                    failures.append(_describe(error))
                except Exception as error:  # a fault of ours, or of the machine: shown whole
                    traceback.print_exc()
                    code = 1
                    failures.append(_describe(error))

            for client in ("httpx", "httpx2"):  # Hydra's root logger would show a line for each request to the hub
                logging.getLogger(client).setLevel(logging.WARNING)
            register()
            Plugins.instance().register(SweepFiles)
            try:
                hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name=config_name)(run)()
            except KeyboardInterrupt:
                print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
                sys.exit(130)
            if len(failures) > 1 or (failures and "-m" in sys.argv):
                print("failed:", *failures, sep="\n  ", file=sys.stderr)
            sys.exit(code)

        return main

    return decorate


def _describe(error: Exception) -> str:
    multirun = HydraConfig.get().mode == RunMode.MULTIRUN
    job = " ".join(HydraConfig.get().overrides.task) if multirun else ""
    message = (str(error) or type(error).__name__).splitlines()[0]
    return f"{job}: {message}"
