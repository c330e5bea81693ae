"""List runs: status, step, main metrics, host, and the time since the last sign of life.

    python -m prefopt.runs
    python -m prefopt.runs status=[failed,died] name=dpo-* watch=true

A run whose process is gone, or whose Slurm job is, is never shown as running (prefopt/tracking/process.py). watch=true
shows losses, speed and the time left until all runs have ended, or until Ctrl-C, which ends no run.
"""

import contextlib
import os
import time
from pathlib import Path

from omegaconf import DictConfig
from rich.live import Live

from prefopt.cli.program import program
from prefopt.config.parse import parse
from prefopt.errors import UserError
from prefopt.tracking.live import Watch
from prefopt.tracking.process import ACTIVE_STATES, STATES
from prefopt.tracking.status import RunsConfig, RunStatus, select, status_table
from prefopt.utils.console import console

WATCH_EVERY_S = 5.0


@program("runs", RunsConfig)
def main(cfg: DictConfig) -> None:
    config = parse(cfg, RunsConfig)
    if wrong := sorted(set(config.status) - set(STATES)):
        raise UserError(f"status: there is no {', '.join(wrong)}. A run is {', '.join(STATES)}.")
    if not Path(config.runs_dir).is_dir():
        raise UserError(
            f"runs_dir={config.runs_dir}: there is no such folder. The first run makes it: python -m prefopt.train "
            f"runs_dir={config.runs_dir}"
        )
    if not config.watch:
        console().print(status_table(select(config)))
        return
    runs = watch(config)
    console().print(status_table(runs))


def watch(config: RunsConfig) -> list[RunStatus]:
    """Show losses, speed and the time left until no run is under way, or until Ctrl-C. Returns the runs as they are
    then. On a terminal a table is kept up to date; elsewhere a line is printed whenever something has changed."""
    runs: list[RunStatus] = []
    watched = Watch()
    with contextlib.suppress(KeyboardInterrupt), contextlib.ExitStack() as stack:
        screen = None
        if os.isatty(1):
            screen = stack.enter_context(Live(console=console(), screen=True, auto_refresh=False))
        while True:
            runs = select(config)
            watched.look(runs)
            if screen:
                screen.update(watched.table(screen.console.height), refresh=True)
            else:
                for line in watched.changes():
                    print(line, flush=True)
            if not any(run.state in (*ACTIVE_STATES, "unknown") for run in runs):
                break
            time.sleep(WATCH_EVERY_S)
    return runs


if __name__ == "__main__":
    main()
