"""Training in stages, each on the policy's own responses."""

import dataclasses
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.config.parse import build
from prefopt.config.schema import ModelConfig
from prefopt.data.formats import Format, Message, content_id
from prefopt.data.sources import digest, read_rows, write_rows
from prefopt.errors import UserError
from prefopt.rewards.scorers import RewardScorer
from prefopt.tracking.process import release_lock
from prefopt.training.config import OnlineConfig, TrainConfig, check_online, resolve
from prefopt.utils.console import say
from prefopt.utils.distributed import world_size

if TYPE_CHECKING:
    from prefopt.objectives.base import Objective
    from prefopt.tracking.run import Run


def split_prompts(prompts: Sequence[list[Message]], n: int) -> list[list[list[Message]]]:
    """The prompts, each once, in `n` parts whose sizes differ by one at most. Which part a prompt is in depends on the
    prompts alone, not on their order.

    Raises UserError where there are fewer prompts than parts.
    """
    distinct = {content_id("part", prompt): prompt for prompt in prompts}
    if len(distinct) < n:
        raise UserError(f"{len(distinct)} different prompts do not suffice for stages={n}.")
    ordered = [distinct[key] for key in sorted(distinct)]
    return [ordered[len(ordered) * i // n : len(ordered) * (i + 1) // n] for i in range(n)]


def stage_config(config: OnlineConfig, folder: Path, policy: Path | None) -> TrainConfig:
    """What `prefopt.train` is asked for in the stage in `folder`, which begins from `policy` (None: the first one)."""
    values: dict[str, Any] = {f.name: getattr(config, f.name) for f in dataclasses.fields(TrainConfig)}
    values["dataset"] = dataclasses.replace(config.dataset, train=str(folder / "scored.jsonl.gz"))
    values["runs_dir"] = str(folder)
    if policy:
        # An adapter that the first stage merged into its policy is there already.
        values["peft"] = dataclasses.replace(config.peft, path=None)
        values["model"] = ModelConfig(config.model.name, str(policy), None)
        if config.stage_reference == "initial":
            values["reference_model"] = config.reference_model or config.model.path
    return TrainConfig(**values)


def run_stage(
    config: OnlineConfig,
    objective: "Objective",
    scorer: RewardScorer,
    prompts: list[list[Message]],
    folder: Path,
    policy: Path | None,
    told: dict[str, str],
) -> "Run":
    """Sample, score and train, as far as that is not done; the finished run."""
    from prefopt.generation.responses import generate_resumable
    from prefopt.rewards.rows import score_rows
    from prefopt.training.setup import prepare_run, run
    from prefopt.utils.stats import mean_and_error

    training = stage_config(config, folder, policy)
    samples, scored = folder / "samples.jsonl.gz", folder / "scored.jsonl.gz"
    where, show = (config.backend, config.device, config.precision), config.logger.progress
    if not samples.is_file():
        partial = folder / "samples.partial"
        say(f"{folder}: {config.samples_per_prompt} responses to each of {len(prompts)} prompts")
        n = config.samples_per_prompt
        drawn, _ = generate_resumable(
            training.model, prompts, config.stage_sampling, n, config.seed, *where, partial, show
        )
        write_rows(samples, [{"prompt": p, **row} for p, row in zip(prompts, drawn, strict=True)])
        partial.unlink()
    if not scored.is_file():
        rows = score_rows(list(read_rows(str(samples))), scorer, config.device, config.precision, show=show)
        # The objective reads `rewards`: as they are, or on [0, 1] where it wants them there.
        wanted = "rewards_01" if objective.reward_range == (0.0, 1.0) else "rewards"
        write_rows(scored, [row | {"rewards": row[wanted], "raw_rewards": row["rewards"]} for row in rows])
        mean, error = mean_and_error([r for row in rows for r in row["rewards"]])
        say(f"{folder}: mean reward {mean:.3f} ± {error:.3f}")
    planned = prepare_run(training)
    run(planned, **told)
    return planned.run


def check_format(config: OnlineConfig) -> None:
    """Raise UserError where the data set's format does not read what a stage writes."""
    n = config.samples_per_prompt
    row = {"prompt": "Hello", "responses": [str(i) for i in range(n)], "rewards": [float(i) for i in range(n)]}
    try:
        build(config.dataset.format, Format, "dataset.format")(row)
    except (KeyError, ValueError) as error:
        raise UserError(
            f"dataset.format does not read rows of samples_per_prompt={n} scored responses, which a stage trains on "
            f"({error}): leave dataset=samples."
        ) from None


def prepare_online(config: OnlineConfig) -> "tuple[Objective, RewardScorer, list[list[list[Message]]]]":
    """The objective, the scorer, and each stage's prompts; `config` is one that `check_online` has passed and whose
    hardware is resolved. Raises UserError for what cannot be run."""
    from prefopt.generation.responses import read_prompts
    from prefopt.objectives.base import Objective
    from prefopt.training.setup import build_components as train_parts

    objective = build(config.objective, Objective, "objective")
    scorer = build(config.scorer, RewardScorer, "scorer")
    if "rejected" not in objective.completions or objective.model_kind == "reward_model":
        raise UserError(
            f"objective {objective.name} does not train a policy on pairs; take one that does, such as dpo."
        )
    train_parts(stage_config(config, Path(config.runs_dir), None))
    check_format(config)
    _, prompts = read_prompts(config.prompts, config.prompts_split)
    return objective, scorer, split_prompts(prompts, config.stages)


def run_pending(config: OnlineConfig, **told: str) -> None:
    """All stages that are not finished yet; `told` goes into their records and that of the whole.

    Raises UserError, and stop.Interrupted with everything saved."""
    from prefopt.errors import Interrupted
    from prefopt.tracking.run import Run

    if world_size() > 1:
        raise UserError("prefopt.online runs in one process, and this was started as several (WORLD_SIZE).")
    check_online(config)
    resolve(config)
    objective, scorer, stages = prepare_online(config)
    places = {"prompts": (config.prompts, config.prompts_split or "train"),
              "heldout": (config.dataset.heldout, config.dataset.heldout_split)}  # fmt: skip
    run = Run.open(
        dataclasses.asdict(config),
        f"online-{objective.name}",
        {k: digest(path, split) for k, (path, split) in places.items() if path},
    )
    if run.finished:
        say(f"{run.folder}: finished, skipped (remove the folder to run it again)")
        return
    began = time.monotonic()
    run.start(stages=[], **told)
    evaluations: list[dict[str, Any]] = []
    steps = 0
    policy: Path | None = None
    try:
        for n, part in enumerate(stages, start=1):
            done = run_stage(config, objective, scorer, part, run.folder / f"stage_{n}", policy, told)
            policy = done.policy_folder
            # The first evaluation of a later stage is the last of the one before.
            found = done.record["evaluations"][bool(evaluations) :]
            evaluations += [row | {"step": row["step"] + steps, "stage": n} for row in found]
            steps += done.record["config"]["steps"]
            stage = {"stage": n, "prompts": len(part), "run": str(done.folder), "policy": str(policy)}
            stage |= {key: done.record[key] for key in ("data", "initial_weights", "final_weights")}
            run.update(stages=[*run.record["stages"], stage])
    except (Interrupted, KeyboardInterrupt) as error:
        run.interrupt(str(error) or "Ctrl-C")
        raise
    except Exception:
        run.fail(traceback.format_exc())
        raise
    finally:
        release_lock(run.folder)
    done = run.record["stages"]
    ends = {"initial_weights": done[0]["initial_weights"], "final_weights": done[-1]["final_weights"]}
    pairs = sum(stage["data"]["train"]["items"] for stage in done)
    assert policy is not None  # there is at least one stage
    if not run.policy_folder.exists():  # where the jobs that evaluate a run look for it
        run.policy_folder.symlink_to(policy.relative_to(run.folder))
    data = {"train": {"items": pairs}}
    run.finish(evaluations=evaluations, data=data, **ends, seconds=time.monotonic() - began)
    say(f"{run.folder}: finished; the policy is in {run.policy_folder}")
