"""AlpacaEval of policies, models or files of outputs against a baseline: win rate and length-controlled win rate.

    python -m prefopt.alpaca run=runs/RUN judge=gpt4o_mini                        # against the model it began from
    python -m prefopt.alpaca run=runs/RUN judge=claude_haiku baseline=runs/SFT checkpoints=all
    python -m prefopt.alpaca -m run=runs/A,runs/B judge=gpt4o_mini,claude_haiku
    python -m prefopt.alpaca 'run=runs/*' judge=gpt4o_mini                        # all finished runs
    python -m prefopt.alpaca model=hub model.path=NAME baseline=gpt4_turbo output=results/other judge=gpt4o_mini
    python -m prefopt.alpaca model_outputs=FILE.json baseline=gpt4_turbo output=results/other judge=gpt4o_mini
    python -m prefopt.alpaca run=runs/RUN judge=reward_model instructions=questions.jsonl   # costs nothing

Preferences and win rates come from the package alpaca-eval. Its length-controlled win rate needs all 805 questions of
AlpacaEval 2 and a preference for each. Answers are kept in the user's cache by weights and settings, preferences in
RUN/alpaca by judge and texts: a stopped evaluation goes on, and no preference is paid for twice. The result of a
comparison is a folder in RUN/alpaca (or `output`) with record.json, annotations.json, and the answers in alpaca-eval's
format: model_outputs.json and reference_outputs.json.
"""

from pathlib import Path

from omegaconf import DictConfig

from prefopt.cli.multirun import Point
from prefopt.cli.program import program, refuse_launcher_without_multirun
from prefopt.config.parse import build, parse
from prefopt.evaluation.alpaca import run_pending, subjects
from prefopt.evaluation.config import AlpacaConfig, check_alpaca
from prefopt.evaluation.judges import Judge
from prefopt.launch.base import Launcher, SweepJob
from prefopt.launch.sweep import Sweep
from prefopt.tracking.policies import each_run


def plan_job(point: Point, label: str, config: AlpacaConfig, _: Launcher, folder: Path) -> SweepJob:
    """A sweep's job for one point. Raises UserError for a point that cannot be evaluated."""
    check_alpaca(config)
    build(config.judge, Judge, "judge").check()
    models = [subject.model for one in each_run(config) for subject in subjects(one)]
    return SweepJob(point.overrides, label, config, models[-1] or config.model, folder)


@program("alpaca", AlpacaConfig, Sweep("alpaca", AlpacaConfig, plan_job, log_lines=0))
def main(cfg: DictConfig) -> None:
    refuse_launcher_without_multirun()
    run_pending(parse(cfg, AlpacaConfig))


if __name__ == "__main__":
    main()
