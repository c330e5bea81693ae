"""Training in stages, each on the policy's own responses."""

import dataclasses
import functools
import logging
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.config.parse import build
from prefopt.config.schema import ModelConfig, MultiReferenceConfig
from prefopt.data.fields import content_id
from prefopt.data.formats import Format
from prefopt.data.items import Message, Pair
from prefopt.data.sources import digest, read_rows, write_rows
from prefopt.errors import Interrupted, UserError
from prefopt.models.fingerprint import files_of
from prefopt.objectives import SIDES
from prefopt.rewards.scorers import RewardScorer
from prefopt.tracking.process import release_lock
from prefopt.training.config import OnlineConfig, TrainConfig, check_online, resolve
from prefopt.training.publish import check_push, push
from prefopt.utils.distributed import (
    broadcast,
    check_agreement,
    is_main_process,
    on_main_process,
    process_group,
    start_watchdog,
)
from prefopt.utils.store import checksums

if TYPE_CHECKING:
    from prefopt.objectives.base import Objective
    from prefopt.tracking.run import Run

log = logging.getLogger(__name__)

PARTIAL = "samples.partial"  # in a stage's folder, while it samples
EXTRAPOLATED = "extrapolated"  # in a stage's folder: the policy that it begins from, with momentum


def split_prompts(prompts: Sequence[list[Message]], n: int) -> list[list[list[Message]]]:
    """Split the distinct prompts into `n` parts whose sizes differ by one at most. The order of the prompts does not
    matter.

    Raises UserError where there are fewer prompts than parts.
    """
    distinct = {content_id("part", prompt): prompt for prompt in prompts}
    if len(distinct) < n:
        raise UserError(f"{len(distinct)} different prompts do not suffice for stages={n}.")
    ordered = [distinct[key] for key in sorted(distinct)]
    return [ordered[len(ordered) * i // n : len(ordered) * (i + 1) // n] for i in range(n)]


def stage_config(config: OnlineConfig, folder: Path, policy: Path | None, before: Path | None = None) -> TrainConfig:
    """The training config of the stage in `folder`. `policy` is that of the stage before, None in the first stage, and
    `before` that of the stage before that one, None also in the second."""
    values: dict[str, Any] = {f.name: getattr(config, f.name) for f in dataclasses.fields(TrainConfig)}
    values["dataset"] = dataclasses.replace(config.dataset, train=str(folder / "scored.jsonl.gz"))
    values["runs_dir"] = str(folder)
    values["push_to_hub"] = None  # the last policy alone is put there
    values["merge_adapter"] = True  # the next stage puts its adapter on a whole model, and on no other adapter
    if policy and config.stage_reference == "accelerated":
        earlier = str(before) if before else initial_model(config.model)
        values["model"] = config.model.exported(str(folder / EXTRAPOLATED))
        values["reference_model"] = str(policy)
        # log p = (1 + m) lp - m lp_before; see `prefopt.training.momentum`.
        weights = [1 + config.stage_momentum, -config.stage_momentum]
        values["multi_reference"] = MultiReferenceConfig([earlier], "geometric", weights, clip=None)
    elif policy:
        values["model"] = config.model.exported(str(policy))
        if config.stage_reference == "initial":
            values["reference_model"] = config.reference_model or initial_model(config.model)
    return TrainConfig(**values)


def initial_model(config: ModelConfig) -> str:
    """The model as `reference_model` names it, which has no revision: a pinned one by its folder in the hub's cache,
    where the first stage has put it."""
    return str(files_of(config.path, config.revision)) if config.revision else config.path


class StageFiles:
    """The files that later parts of an online run read. Their digests are in its record, by their paths in its folder:
    `files` = {path: {"sha256", and "rows" where it has rows}}."""

    def __init__(self, run: "Run"):
        self.run = run

    def are_whole(self, file: Path) -> bool:
        """Whether `file` is what the record says of it. A difference is said in the log."""
        known = self._known(file)
        if known is None:
            return False
        if not file.is_file() or digest(str(file)) != known["sha256"]:
            log.warning(f"  {file} is damaged: it is not the file of {known['rows']} rows that was written.")
            return False
        return True

    def write(self, file: Path, rows: list[dict[str, Any]]) -> None:
        """Write rows, and record them. Raises UserError where others were trained on already."""
        write_rows(file, rows)
        found, known = {"rows": len(rows), "sha256": digest(str(file))}, self._known(file)
        if known not in (None, found) and any(file.parent.glob("*/record.json")):
            raise UserError(
                f"{file} was damaged, and made anew it holds other rows than {file.parent} has trained on: another "
                "machine may compute differently. Bring the old file back, or remove that folder and later stages."
            )
        self.run.update(files=self.run.record.get("files", {}) | {self._name(file): found})

    def check_policy(self, policy: Path) -> None:
        """Raise UserError where the policy of a stage that was finished before is not what the record says of it."""
        found, known = self._policy(policy), self._below(policy)
        if wrong := sorted(name for name in known if found.get(name) != known[name]):
            raise UserError(
                f"{self.run.folder / wrong[0]} is damaged: it is not what its stage has written. Bring it back, or "
                f"remove {policy.parent} to train that stage again."
            )

    def record_policy(self, policy: Path) -> None:
        """Record the policy of a stage that has just been finished. Where the record has another of it, what later
        stages have drawn is forgotten, since it is that one's."""
        found, known = self._policy(policy), self._below(policy)
        stages = [f"stage_{n}" for n in range(1, int(policy.parts[-3].removeprefix("stage_")) + 1)]
        kept = self.run.record.get("files", {})
        if known and known != found:
            kept = {name: facts for name, facts in kept.items() if name.partition("/")[0] in stages}
        self.run.update(files={name: facts for name, facts in kept.items() if name not in known} | found)

    def _policy(self, policy: Path) -> dict[str, Any]:
        from prefopt.training.checkpoint import MODEL_CARD

        # The model card names commands and folders, and no later stage reads it.
        return {
            self._name(policy / name): {"sha256": value}
            for name, value in checksums(policy).items()
            if name != MODEL_CARD
        }

    def _below(self, policy: Path) -> dict[str, Any]:
        recorded = self.run.record.get("files", {})
        return {name: facts for name, facts in recorded.items() if name.startswith(f"{self._name(policy)}/")}

    def _name(self, file: Path) -> str:
        return file.relative_to(self.run.folder).as_posix()

    def _known(self, file: Path) -> dict[str, Any] | None:
        known: dict[str, Any] | None = self.run.record.get("files", {}).get(self._name(file))
        return known


def run_stage(
    config: OnlineConfig,
    objective: "Objective",
    scorer: RewardScorer,
    prompts: list[list[Message]],
    folder: Path,
    policy: Path | None,
    before: Path | None,
    files: StageFiles,
    facts: dict[str, str],
) -> "Run":
    """Sample, score and train, as far as that is not done yet. Returns the finished run. A collective.

    `policy` and `before` are as of `stage_config`, and `facts` go into the run's record. Files of the stage that are
    damaged are made anew. Raises UserError for a damaged policy.
    """
    from prefopt.training.setup import prepare_run, run

    start_watchdog(config.engine.hang_s)
    training = stage_config(config, folder, policy, before)
    if training.multi_reference.models and config.stage_reference == "accelerated":
        on_main_process(functools.partial(make_start, config, training, folder, files))
    samples, scored = folder / "samples.jsonl.gz", folder / "scored.jsonl.gz"
    if not broadcast(is_main_process() and files.are_whole(scored)):
        if not broadcast(is_main_process() and files.are_whole(samples)):
            sample_responses(config, training.model, prompts, samples, files)
        score_responses(config, objective, scorer, samples, scored, files)
    if is_main_process():
        (folder / PARTIAL).unlink(missing_ok=True)
    planned = prepare_run(training, files.run.folder)
    if planned.run.finished and is_main_process():
        files.check_policy(planned.run.policy_folder)
    run(planned, **facts)
    on_main_process(functools.partial(files.record_policy, planned.run.policy_folder))
    planned.run.reload()  # the main process alone has written what it ended with
    return planned.run


def make_start(config: OnlineConfig, training: TrainConfig, folder: Path, files: StageFiles) -> None:
    """Write the extrapolated policy that the stage in `folder` begins from, unless it was and has been sampled from."""
    from prefopt.training.momentum import write_extrapolated

    target = folder / EXTRAPOLATED
    if not (target.is_dir() and files.are_whole(folder / "samples.jsonl.gz")):
        assert training.reference_model
        latest, (earlier,) = training.reference_model, training.multi_reference.models
        models = config.model.exported(latest), ModelConfig(earlier, earlier)
        write_extrapolated(*models, config.stage_momentum, target)


def sample_responses(
    config: OnlineConfig, model: ModelConfig, prompts: list[list[Message]], target: Path, files: StageFiles
) -> None:
    """Write rows {"prompt", "responses", ...} to `target`. Interrupted, it goes on from its partial file, which it
    leaves there."""
    from prefopt.generation.responses import GenerationRequest, generate_resumable

    partial = target.parent / PARTIAL
    log.info(f"{target.parent}: {config.samples_per_prompt} responses to each of {len(prompts)} prompts")
    request = GenerationRequest(
        model=model,
        prompts=prompts,
        sampling=config.stage_sampling,
        samples_per_prompt=config.samples_per_prompt,
        seed=config.seed,
        backend=config.backend,
        server=config.server,
        server_log=target.parent / "server.log",
        device=config.device,
        precision=config.precision,
    )
    responses, _ = generate_resumable(request, partial, config.logger.progress)
    rows = [{"prompt": prompt, **row} for prompt, row in zip(prompts, responses, strict=True)]
    on_main_process(functools.partial(files.write, target, rows))


def score_responses(
    config: OnlineConfig, objective: "Objective", scorer: RewardScorer, samples: Path, target: Path, files: StageFiles
) -> None:
    """Write the rows of `samples` to `target`, each response with its reward."""
    from prefopt.rewards.rows import score_rows
    from prefopt.utils.stats import mean_and_error

    show = config.logger.progress
    rows = score_rows(list(read_rows(str(samples))), scorer, config.device, config.precision, show=show)
    # The objective reads `rewards`: as the scorer gives them, or on [0, 1] where the objective needs them there. Win
    # rates are, which the format makes of raw ones.
    win_rates = config.dataset.format.get("win_rates", False)
    key = "rewards_01" if objective.reward_range == (0.0, 1.0) and not win_rates else "rewards"
    rewarded = [row | {"rewards": row[key], "raw_rewards": row["rewards"]} for row in rows]
    on_main_process(functools.partial(files.write, target, rewarded))
    mean, error = mean_and_error([reward for row in rows for reward in row["rewards"]])
    log.info(f"{target.parent}: mean reward {mean:.3f} ± {error:.3f}")


def check_format(config: OnlineConfig, objective: "Objective") -> None:
    """Raise UserError where the data set's format does not read what a stage writes, or not as `objective` does."""
    n = config.samples_per_prompt
    row = {"prompt": "Hello", "responses": [str(i) for i in range(n)], "rewards": [float(i) for i in range(n)]}
    try:
        item = build(config.dataset.format, Format, "dataset.format")(row)
    except (KeyError, ValueError) as error:
        raise UserError(
            f"dataset.format does not read rows of samples_per_prompt={n} scored responses, which a stage trains on "
            f"({error}): leave dataset=samples."
        ) from None
    is_group = isinstance(item, Pair) and item.others is not None
    if is_group == (objective.completions == SIDES):
        how = "best_worst, best_random or all" if is_group else "group, which keeps prompts whose rewards tie"
        what = "compares two responses" if is_group else "reads no pairs, but all responses to a prompt, or the best"
        raise UserError(f"objective {objective.name} {what}: set dataset.format.pairing={how}.")


def prepare_online(config: OnlineConfig) -> "tuple[Objective, RewardScorer, list[list[list[Message]]]]":
    """Build the objective, the scorer, and the prompts of each stage.

    `check_online` has passed `config`, and its hardware is resolved. Raises UserError for what cannot be run.
    """
    from prefopt.generation.responses import read_prompts
    from prefopt.objectives.base import Objective
    from prefopt.training.setup import build_components, check_multi_reference

    objective = build(config.objective, Objective, "objective")
    config.fill(objective)
    scorer = build(config.scorer, RewardScorer, "scorer")
    if objective.model_kind == "reward_model":
        raise UserError(f"objective {objective.name} does not train a policy; take one that does, such as dpo.")
    if "token_weights" in objective.needs:
        raise UserError(
            f"objective {objective.name} reads weights of tokens, which a stage's own responses do not have: take "
            "another one, such as dpo."
        )
    if config.stage_reference == "accelerated":
        check_multi_reference(objective, "stage_reference=accelerated")
    check_push(config.push_to_hub)
    # What a stage would refuse later is refused now, before anything is sampled.
    build_components(stage_config(config, Path(config.runs_dir), None))
    check_format(config, objective)
    _, prompts = read_prompts(config.prompts, config.prompts_split)
    return objective, scorer, split_prompts(prompts, config.stages)


def run_pending(config: OnlineConfig, **facts: str) -> Path:
    """Run all stages that are not finished yet; the folder. `facts` go into their records and that of the whole.

    Raises UserError, and Interrupted with everything saved.
    """
    from prefopt.tracking.run import Run
    from prefopt.training.setup import model_parts

    check_online(config)
    resolve(config)
    objective, scorer, stage_prompts = prepare_online(config)
    run = Run.open(dataclasses.asdict(config), f"online-{objective.name}", data_digests(config))
    parts = model_parts(config) | {f"the {part} of the scorer": value for part, value in scorer.model_files().items()}
    run.refuse_changed_model(parts)
    # Around all stages: what a stage trains with joins this group.
    with process_group(config.device, config.engine.name != "single"):
        check_agreement("were started with different arguments or data", run.identity())
        if run.finished:
            log.info(f"{run.folder}: finished, skipped (remove the folder to run it again)")
        else:
            try:
                run.start(stages=[], model=parts, **facts)
                run_stages(config, objective, scorer, stage_prompts, run, facts)
            except (Interrupted, KeyboardInterrupt) as error:
                run.interrupt(str(error) or "Ctrl-C")
                raise
            except Exception:
                run.fail(traceback.format_exc())
                raise
            finally:
                start_watchdog(None)
                release_lock(run.folder)
    if is_main_process():
        push(config.push_to_hub, run.policy_folder)
    return run.folder


def run_stages(
    config: OnlineConfig,
    objective: "Objective",
    scorer: RewardScorer,
    stage_prompts: list[list[list[Message]]],
    run: "Run",
    facts: dict[str, str],
) -> None:
    """Run the stages one after the other, and finish `run`. A collective."""
    began = time.monotonic()
    evaluations: list[dict[str, Any]] = []
    steps = 0
    before: Path | None = None
    policy: Path | None = None
    for n, prompts in enumerate(stage_prompts, start=1):
        folder = run.folder / f"stage_{n}"
        stage_run = run_stage(config, objective, scorer, prompts, folder, policy, before, StageFiles(run), facts)
        before, policy, record = policy, stage_run.policy_folder, stage_run.record
        # The first evaluation of a later stage is the last one of the stage before.
        stage_evaluations = record["evaluations"][1:] if evaluations else record["evaluations"]
        evaluations += [row | {"step": row["step"] + steps, "stage": n} for row in stage_evaluations]
        steps += record["config"]["steps"]
        places = {"run": stage_run.folder, "policy": policy}
        stage: dict[str, Any] = {name: place.relative_to(run.folder).as_posix() for name, place in places.items()}
        stage |= {"stage": n, "prompts": len(prompts)}
        stage |= {key: record[key] for key in ("data", "initial_weights", "final_weights")}
        run.update(stages=[*run.record["stages"], stage])

    assert policy is not None  # there is at least one stage
    if is_main_process() and not run.policy_folder.exists():  # where the jobs that evaluate a run look for it
        run.policy_folder.symlink_to(policy.relative_to(run.folder))
    stages = run.record["stages"]
    run.finish(
        evaluations=evaluations,
        data={"train": {"items": sum(stage["data"]["train"]["items"] for stage in stages)}},
        initial_weights=stages[0]["initial_weights"],
        final_weights=stages[-1]["final_weights"],
        seconds=time.monotonic() - began,
    )
    log.info(f"{run.folder}: finished; the policy is in {run.policy_folder}")


def data_digests(config: OnlineConfig) -> dict[str, str]:
    """The digests of the files that decide the result: the prompts, and the held-out rows where there are any."""
    digests = {"prompts": digest(config.prompts, config.prompts_split or "train")}
    if config.dataset.heldout:
        digests["heldout"] = digest(config.dataset.heldout, config.dataset.heldout_split)
    return digests
