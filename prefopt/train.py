"""Train one policy, or one per point of a grid.

    python -m prefopt.train objective=dpo objective.beta=0.1
    python -m prefopt.train -m objective=dpo,mmpo objective.beta=0.05,0.5

A run that is finished is skipped, one that was interrupted goes on from its last checkpoint. The jobs of a grid are
started by a launcher (prefopt/launch/sweep.py).
"""

from pathlib import Path

from omegaconf import DictConfig

from prefopt.cli.multirun import Point
from prefopt.cli.program import program, refuse_launcher_without_multirun
from prefopt.config.parse import parse
from prefopt.data.dataset_path import replace_path
from prefopt.launch.base import Launcher, SweepJob, configure_hardware
from prefopt.launch.sweep import Sweep
from prefopt.reporting.run_curves import write_curves
from prefopt.tracking.best import register_best
from prefopt.training.config import TrainConfig, check, resolve
from prefopt.training.publish import refuse_push_of_sweep
from prefopt.training.setup import prepare_run, run

register_best()


def plan_job(point: Point, label: str, config: TrainConfig, launcher: Launcher, _: Path) -> SweepJob:
    """Raises UserError for a job that cannot be run, or MissingAssetError where only a model or data set is lacking."""
    check(config)
    refuse_push_of_sweep(config.push_to_hub)
    configure_hardware(config, launcher)
    planned = prepare_run(config)
    if not planned.run.begun:  # decided now, for the job: what else is finished when it starts does not count
        config.resume = str(planned.origin.folder) if planned.origin else None
    return SweepJob(point.overrides, label, config, config.model, planned.run.folder, planned.run)


SWEEP = Sweep("train", TrainConfig, plan_job, finish=write_curves)


@program("train", TrainConfig, SWEEP, replace_path)
def main(cfg: DictConfig) -> None:
    refuse_launcher_without_multirun()
    config = parse(cfg, TrainConfig)
    check(config)
    resolve(config)
    plan = prepare_run(config)
    run(plan)
    write_curves(plan.run.folder)


if __name__ == "__main__":
    main()
