"""List runs: status, step, main metrics, host, and the time since the last sign of life.

    python -m prefopt.runs
    python -m prefopt.runs status=[failed,died] name=dpo-* watch=true
    python -m prefopt.runs name=dpo-* best=optimizer.lr          # of the best run: by oracle reward, or else accuracy

A run whose process is gone, or whose Slurm job is, is never shown as running (prefopt/tracking/process.py).
"""

import contextlib
import os
import sys
import time
from pathlib import Path

from omegaconf import DictConfig
from rich.live import Live

from prefopt.cli.program import program
from prefopt.config.parse import parse
from prefopt.errors import UserError
from prefopt.tracking.process import ACTIVE_STATES, STATES
from prefopt.tracking.status import RunsConfig, best, select, status_table
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
    if config.best:
        print(best(select(config), config.best))
        return
    if not config.watch:
        console().print(status_table(select(config)))
        return
    with contextlib.suppress(KeyboardInterrupt):
        watch(config)


def watch(config: RunsConfig) -> None:
    """Show the runs until none of them is under way, and how they ended. On a terminal the table is kept up to date;
    elsewhere it is printed whenever the state of a run has changed."""
    is_terminal = os.isatty(1)
    before: list[tuple[Path, str]] | None = None
    with contextlib.ExitStack() as stack:
        live = stack.enter_context(Live(console=console(), screen=True, auto_refresh=False)) if is_terminal else None
        while True:
            runs = select(config)
            states = [(run.folder, run.state) for run in runs]
            if live:
                live.update(status_table(runs), refresh=True)
            elif states != before:
                console().print(status_table(runs))
                sys.stdout.flush()
            before = states
            if not any(state in (*ACTIVE_STATES, "unknown") for _, state in states):
                break
            time.sleep(WATCH_EVERY_S)
    if is_terminal:  # the screen is gone
        console().print(status_table(runs))


if __name__ == "__main__":
    main()
