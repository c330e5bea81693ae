"""MT-Bench of policies, models or files of answers: a judge's ratings, 1 to 10, of 80 conversations of two turns.

    python -m prefopt.mtbench run=runs/RUN judge=gpt4
    python -m prefopt.mtbench run=runs/RUN judge=gpt4 checkpoints=all
    python -m prefopt.mtbench -m run=runs/A,runs/B judge=gpt4,gpt41
    python -m prefopt.mtbench 'run=runs/*' judge=gpt4                        # all finished runs
    python -m prefopt.mtbench model=hub model.path=NAME output=results/other judge=gpt4
    python -m prefopt.mtbench answers=FILE.jsonl output=results/other judge=gpt4
    python -m prefopt.mtbench run=runs/RUN judge=local judge.base_url=http://localhost:8000/v1 judge.model=NAME

Prompts, temperatures and the score are FastChat's (single-answer grading). The judge and the reference answers are part
of the metric's name. Answers are kept in the user's cache by weights and settings, the judge's replies in RUN/mtbench
(or `output`): a stopped job goes on, and no reply is paid for twice. A result is a folder there with record.json, and
with model_answer.jsonl and judgments.jsonl in FastChat's format.
"""

from pathlib import Path

from omegaconf import DictConfig

from prefopt.cli.multirun import Point
from prefopt.cli.program import program, refuse_launcher_without_multirun
from prefopt.config.parse import parse
from prefopt.evaluation.config import MtbenchConfig
from prefopt.evaluation.mtbench import plan, run_pending
from prefopt.launch.base import Launcher, SweepJob
from prefopt.launch.sweep import Sweep


def plan_job(point: Point, label: str, config: MtbenchConfig, _: Launcher, folder: Path) -> SweepJob:
    """A sweep's job for one point. Raises UserError for a point that cannot be evaluated."""
    return SweepJob(point.overrides, label, config, plan(config)[-1].subject.model or config.model, folder)


@program("mtbench", MtbenchConfig, Sweep("mtbench", MtbenchConfig, plan_job, log_lines=0))
def main(cfg: DictConfig) -> None:
    refuse_launcher_without_multirun()
    run_pending(parse(cfg, MtbenchConfig))


if __name__ == "__main__":
    main()
