"""Evaluate a run's policies, or any model, on tasks of LM-Harness: one JSON record per checkpoint and task.

    python -m prefopt.harness run=runs/RUN tasks=mmpo                  # the final policy
    python -m prefopt.harness run=runs/RUN tasks=[arc_easy,piqa] checkpoints=all
    python -m prefopt.harness 'run=runs/*' tasks=mmpo                  # all finished runs, one after the other
    python -m prefopt.harness -m run=runs/A,runs/B tasks=mmpo          # a job for each
    python -m prefopt.harness model=hub model.path=Qwen/Qwen2.5-0.5B-Instruct output=results/qwen tasks=mappo

A checkpoint is loaded once for all tasks. Each task is evaluated by itself, so its figures do not depend on the other
tasks; they are those of `lm-eval run` with the same arguments. The records are in RUN/harness (or `output`), named by
checkpoint, task and settings, and lm-eval's own files in its folder lm_eval. An evaluation that has a record is not
computed again.
"""

from pathlib import Path

from omegaconf import DictConfig

from prefopt.cli.multirun import Point
from prefopt.cli.program import program, refuse_launcher_without_multirun
from prefopt.config.parse import parse
from prefopt.evaluation.config import HarnessConfig, check_harness
from prefopt.evaluation.harness import checkpoints, run_pending
from prefopt.evaluation.results import task_names
from prefopt.launch.base import Launcher, SweepJob
from prefopt.launch.sweep import Sweep
from prefopt.tracking.policies import each_run


def plan_job(point: Point, label: str, config: HarnessConfig, _: Launcher, folder: Path) -> SweepJob:
    """A sweep's job for one point. Raises UserError for a point that cannot be evaluated."""
    check_harness(config)
    task_names(config.tasks)
    policies = [policy for one in each_run(config) for policy in checkpoints(one)[0]]
    return SweepJob(point.overrides, label, config, policies[-1].model, folder)


@program("harness", HarnessConfig, Sweep("harness", HarnessConfig, plan_job, log_lines=0))
def main(cfg: DictConfig) -> None:
    refuse_launcher_without_multirun()
    run_pending(parse(cfg, HarnessConfig))


if __name__ == "__main__":
    main()
