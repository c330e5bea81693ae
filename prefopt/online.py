"""Train in stages, each on the policy's own responses: sample, score, pair best with worst, train, and again.

    python -m prefopt.online objective=mappo dataset=sentiment_offline scorer=vader stages=3 steps=8 \\
        prompts=package://prefopt/data/sentiment_offline.jsonl.gz prompts_split=train

(Iterative DPO, and with objective=mappo MaPPO's online form; arXiv 2507.21183.) The prompts are cut into as many equal
parts as there are stages, by their content. A stage draws responses to its part from the policy that the stage before
has left, scores them, and trains on the best against the worst of each prompt, from that policy on.

The folder holds record.json and stage_1, stage_2, ..., each with samples.jsonl.gz, scored.jsonl.gz and a run like any
other. What is there is not made again, so the same command goes on wherever it was stopped, also where the folder was
moved to another runs_dir. With -m every point of a grid is a job of its own. Several processes share all parts of a
stage:

    torchrun --nproc-per-node=8 -m prefopt.online engine=zero2 objective=mappo scorer=vader prompts=prompts.jsonl
"""

from pathlib import Path

from omegaconf import DictConfig

from prefopt.cli.multirun import Point
from prefopt.cli.program import program, refuse_launcher_without_multirun
from prefopt.config.parse import parse
from prefopt.launch.base import Launcher, SweepJob, configure_hardware
from prefopt.launch.sweep import Sweep
from prefopt.reporting.run_curves import write_curves
from prefopt.tracking.best import register_best
from prefopt.training.config import OnlineConfig, check_online
from prefopt.training.online import prepare_online, run_pending
from prefopt.training.publish import refuse_push_of_sweep

register_best()


def plan_job(point: Point, label: str, config: OnlineConfig, launcher: Launcher, folder: Path) -> SweepJob:
    """Raises UserError for what cannot be run."""
    check_online(config)
    refuse_push_of_sweep(config.push_to_hub)
    configure_hardware(config, launcher)
    prepare_online(config)
    return SweepJob(point.overrides, label, config, config.model, folder)


@program("online", OnlineConfig, Sweep("online", OnlineConfig, plan_job, log_lines=1))
def main(cfg: DictConfig) -> None:
    refuse_launcher_without_multirun()
    write_curves(run_pending(parse(cfg, OnlineConfig)))


if __name__ == "__main__":
    main()
