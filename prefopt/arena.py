"""Arena-Hard of policies, models or files of answers: win rate against a baseline, by a judge, in two games a question.

    python -m prefopt.arena run=runs/RUN judge=gpt41
    python -m prefopt.arena run=runs/RUN judge=gpt41 baseline=runs/SFT checkpoints=all
    python -m prefopt.arena run=runs/RUN judge=gpt41 version=v2.0
    python -m prefopt.arena -m run=runs/A,runs/B judge=gpt41
    python -m prefopt.arena model=hub model.path=NAME output=results/other judge=gpt41
    python -m prefopt.arena answers=FILE.jsonl output=results/other judge=gpt41
    python -m prefopt.arena run=runs/RUN judge=local judge.base_url=http://localhost:8000/v1 judge.model=NAME

Questions, prompts and the weights of verdicts are Arena-Hard's. Judge and baseline are part of the metric's name.
Answers are kept in the user's cache by weights and settings, the judge's replies in RUN/arena (or `output`): a stopped
job goes on, and no reply is paid for twice. A result is a folder there with record.json, and with model_answer.jsonl
and judgments.jsonl in Arena-Hard's format.
"""

from pathlib import Path

from omegaconf import DictConfig

from prefopt.cli.multirun import Point
from prefopt.cli.program import program, refuse_launcher_without_multirun
from prefopt.config.parse import parse
from prefopt.evaluation.arena import plan, run_pending
from prefopt.evaluation.config import ArenaConfig
from prefopt.launch.base import Launcher, SweepJob
from prefopt.launch.sweep import Sweep


def plan_job(point: Point, label: str, config: ArenaConfig, _: Launcher, folder: Path) -> SweepJob:
    """A sweep's job for one point. Raises UserError for a point that cannot be evaluated."""
    return SweepJob(point.overrides, label, config, plan(config)[-1].subject.model or config.model, folder)


@program("arena", ArenaConfig, Sweep("arena", ArenaConfig, plan_job, log_lines=0))
def main(cfg: DictConfig) -> None:
    refuse_launcher_without_multirun()
    run_pending(parse(cfg, ArenaConfig))


if __name__ == "__main__":
    main()
