"""Add rewards to the rows of a file.

    python -m prefopt.score input=samples.jsonl.gz output=scored.jsonl.gz scorer=vader
    python -m prefopt.score input=pairs.jsonl output=scored.jsonl scorer=reward_model scorer.path=runs/RUN/policy
    python -m prefopt.score -m launcher=slurm input=a.jsonl,b.jsonl 'output=scored_${input}' scorer=vader

A row with `responses`, as prefopt.sample writes it, gets the lists `rewards` and `rewards_01`. A pair gets
`chosen_reward`, `rejected_reward`, `chosen_reward_01` and `rejected_reward_01`. The fields with _01 hold the reward on
[0, 1]: sigma(r), or r itself where the scorer's rewards are on [0, 1] already. All other fields are carried over.
Under torchrun the processes share the responses of a reward model.
A sweep leaves outputs as they are that are there already.
"""

from pathlib import Path

from omegaconf import DictConfig

from prefopt.cli.multirun import Point
from prefopt.cli.program import program, refuse_launcher_without_multirun
from prefopt.config.parse import parse
from prefopt.launch.base import Launcher, SweepJob
from prefopt.launch.sweep import Sweep
from prefopt.rewards.config import ScoreConfig
from prefopt.rewards.scored import check_score, score


def plan_job(point: Point, label: str, config: ScoreConfig, _: Launcher, folder: Path) -> SweepJob:
    """A sweep's job for one point. Raises UserError for a point that cannot be scored."""
    return SweepJob(point.overrides, label, config, check_score(config).model, folder)


@program("score", ScoreConfig, Sweep("score", ScoreConfig, plan_job, log_lines=1))
def main(cfg: DictConfig) -> None:
    refuse_launcher_without_multirun()
    score(parse(cfg, ScoreConfig))


if __name__ == "__main__":
    main()
