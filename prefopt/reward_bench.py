"""Accuracies of a run's reward model, or of a policy's implicit reward, on RewardBench or any file of preferences.

    python -m prefopt.reward_bench run=runs/RM rows=llmbar.jsonl
    python -m prefopt.reward_bench run=runs/DPO rows=allenai/reward-bench split=filtered checkpoints=all
    python -m prefopt.reward_bench 'run=runs/*' rows=allenai/reward-bench-2 split=test
    python -m prefopt.reward_bench scorer=hub_reward_model scorer.path=NAME output=results/rm rows=llmbar.jsonl

A reward run is read by its head, and a policy by its implicit reward: no judge is asked. Rows are RewardBench's,
RewardBench 2's, LLMBar's, or pairs with a field `subset` or without. Accuracies are given by subset, and by section and
over all where the rows are a whole benchmark. The results are in RUN/reward_bench (or `output`), a folder each with
record.json and the reward of every response. What has a record is not computed again.
"""

from pathlib import Path

from omegaconf import DictConfig

from prefopt.cli.multirun import Point
from prefopt.cli.program import program, refuse_launcher_without_multirun
from prefopt.config.parse import parse
from prefopt.evaluation.config import RewardBenchConfig, check_reward_bench
from prefopt.evaluation.reward_bench import check_subjects, run_pending
from prefopt.launch.base import Launcher, SweepJob
from prefopt.launch.sweep import Sweep


def plan_job(point: Point, label: str, config: RewardBenchConfig, _: Launcher, folder: Path) -> SweepJob:
    """A sweep's job for one point. Raises UserError for a point that cannot be evaluated."""
    check_reward_bench(config)
    return SweepJob(point.overrides, label, config, check_subjects(config)[-1].scorer.model, folder)


@program("reward_bench", RewardBenchConfig, Sweep("reward_bench", RewardBenchConfig, plan_job, log_lines=0))
def main(cfg: DictConfig) -> None:
    refuse_launcher_without_multirun()
    run_pending(parse(cfg, RewardBenchConfig))


if __name__ == "__main__":
    main()
