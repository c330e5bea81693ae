"""From a config to a finished run: check and build the components, train, export the policy.

`prepare_run` refuses what can be refused without data and weights; `run` does the rest. Modules that import torch or
transformers, which takes seconds, are imported inside of functions: the help of a program, and its refusal of a bad
command line, do not wait for them.
"""

import dataclasses
import functools
import importlib.util
import logging
import os
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.config.parse import build
from prefopt.config.schema import PeftConfig
from prefopt.errors import UserError
from prefopt.training.config import TrainConfig
from prefopt.utils.console import log_wrapped
from prefopt.utils.distributed import (
    check_agreement,
    is_main_process,
    process_group,
    start_watchdog,
    world_size,
)
from prefopt.utils.files import check_folder, remove
from prefopt.utils.memory import memory_for

if TYPE_CHECKING:
    from prefopt.objectives.base import Objective
    from prefopt.rewards.scorers import RewardScorer
    from prefopt.tracking.run import Run
    from prefopt.training.going_on import Origin
    from prefopt.training.optim import Schedule

log = logging.getLogger(__name__)


@dataclass
class RunPlan:
    """What a config asks for, checked and built as far as that goes without reading data or weights."""

    config: TrainConfig
    objective: "Objective"
    schedule: "Schedule"
    oracle: "RewardScorer | None"
    run: "Run"
    origin: "Origin | None"  # the shorter run that it goes on from


def build_components(config: TrainConfig) -> "tuple[Objective, Schedule, RewardScorer | None]":
    """Build objective, schedule and oracle, and check everything else that needs neither data nor weights. Fills what
    the objective decides into `config`.

    `check` has passed `config`, and its hardware is resolved. Raises UserError, or MissingAssetError where a model or
    data set is not on this machine.
    """
    from prefopt.data.dataset import NO_HELDOUT, check_dataset, has_heldout, made_share
    from prefopt.data.hub import missing
    from prefopt.errors import MissingAssetError
    from prefopt.models.safe_weights import check_adapter
    from prefopt.objectives.base import Objective
    from prefopt.rewards.scorers import RewardScorer
    from prefopt.training.engine import check_engine
    from prefopt.training.loggers import check_logger
    from prefopt.training.optim import Schedule, check_optimizer
    from prefopt.training.publish import check_push

    objective = build(config.objective, Objective, "objective")
    config.fill(objective)
    schedule = build(config.schedule, Schedule, "schedule")
    oracle = build(config.dataset.oracle, RewardScorer, "dataset.oracle") if config.dataset.oracle else None
    if oracle and oracle.reads_rows:
        raise UserError(
            f"dataset.oracle: {type(oracle).__name__} reads what a row holds beside its texts, and the policy's own "
            "samples are in no row. Take a scorer that reads the response: +scorer@dataset.oracle=vader, or "
            "reward_model, hub_reward_model, function."
        )
    if objective.model_kind == "reward_model":
        oracle = None  # a reward model draws no samples

    size = objective.micro_batch_size
    if objective.scope == "micro_batch" and size and config.batch_size % size:
        raise UserError(f"batch_size={config.batch_size} must be a multiple of objective.micro_batch_size={size}.")
    if objective.linked and (config.heldout_pairs or 0) % 2:
        raise UserError(f"objective {objective.name} reads linked pairs: heldout_pairs must be even, or null for all.")
    if "mismatched" in objective.needs and config.batch_size < 2:
        raise UserError(
            f"objective {objective.name} takes the completions of another pair of the step, and batch_size=1 has none: "
            "take more pairs, or reference_point=own below the objective."
        )
    if config.multi_reference.models:
        check_multi_reference(objective, "multi_reference.models")
    if "sequential_kl" in objective.needs and config.reference == "cached":
        raise UserError(
            f"objective {objective.name} reads the reference's distribution at each token, and reference=cached holds "
            "log-probs of completions alone: set reference=resident, or with an adapter reference=adapter_off."
        )
    check_optimizer(config.optimizer)
    check_engine(config.engine)
    check_logger(config.logger)
    check_dataset(config.dataset)
    config.dataset.heldout_share = made_share(config.dataset)  # 0 where the data name held-out rows
    if objective.linked and config.dataset.heldout_share:
        raise UserError(
            f"objective {objective.name} reads linked pairs, two prompts each, and dataset.heldout_share="
            f"{config.dataset.heldout_share:g} would hold out one prompt without the other: give dataset.heldout=FILE, "
            "or dataset.heldout_share=0 for none."
        )
    check_folder("runs_dir", config.runs_dir)
    check_push(config.push_to_hub)
    if config.model.adapter:
        check_adapter(config.model.adapter)
    check_peft(config.peft, objective)
    if config.patience is not None and not has_heldout(config.dataset):
        raise UserError(f"patience watches the held-out loss, and {NO_HELDOUT}")
    if config.reference_model and objective.model_kind == "reward_model":
        raise UserError(
            f"objective {objective.name} trains a reward model, which has no reference_model: leave it out."
        )
    if config.reference_sync.every and "reference" not in objective.needs:
        raise UserError(
            f"objective {objective.name} reads no reference, which reference_sync would move: leave it out."
        )
    if lacking := missing(config.model, config.dataset, oracle.model if oracle else None):
        raise MissingAssetError("\n".join(lacking))
    return objective, schedule, oracle


def check_multi_reference(objective: "Objective", key: str) -> None:
    """Raise UserError where the objective cannot be given several references, which `key` asks for."""
    parts = {
        "prefixes": "the parts of completions",
        "token_weights": "the tokens of completions",
        "sequential_kl": "distributions at each token",
    }
    reads = [text for need, text in parts.items() if need in objective.needs]
    if "reference" not in objective.needs:
        reads = ["no reference"]
    if reads:
        raise UserError(
            f"objective {objective.name} reads {reads[0]}, and {key} makes a virtual reference of whole completions: "
            "leave it out, or take an objective such as dpo."
        )
    if "others" in objective.completions:
        raise UserError(f"objective {objective.name} reads groups, and {key} makes a virtual reference of pairs.")


def check_peft(config: PeftConfig, objective: "Objective") -> None:
    """Raise UserError for quantization that is not possible."""
    if config.quantize and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("peft.quantize needs the package bitsandbytes: pip install -e '.[bitsandbytes]'")
    if config.quantize and objective.model_kind == "reward_model":
        raise UserError(f"objective {objective.name} cannot be trained on weights of 4 bits: set peft.quantize=false.")


def prepare_run(config: TrainConfig, root: Path | None = None) -> RunPlan:
    """Build the components, and identify the run by its config and data. Starts the watchdog. `root`: as of `Run`.

    Raises UserError for what can be refused before data and weights are read.
    """
    from prefopt.data.dataset import has_heldout, split_digest
    from prefopt.tracking.run import Run
    from prefopt.training.going_on import find_origin

    objective, schedule, oracle = build_components(config)
    start_watchdog(config.engine.hang_s)
    names = ["train", "heldout"] if has_heldout(config.dataset) else ["train"]
    digests = {name: split_digest(config.dataset, name) for name in names}
    run = Run.open(dataclasses.asdict(config), objective.name, digests, root)
    if run.begun:
        run.refuse_changed_model(model_parts(config, oracle))
    origin = find_origin(config, run, schedule, functools.partial(model_parts, config, oracle))
    return RunPlan(config, objective, schedule, oracle, run, origin)


def model_parts(config: TrainConfig, oracle: "RewardScorer | None" = None) -> dict[str, str]:
    """Digests of the files of every model that a run reads, by their names in messages."""
    from prefopt.models.fingerprint import model_files
    from prefopt.training.build import further_references, reference_model

    parts = {f"its {part}": value for part, value in model_files(config.model).items()}
    if other := reference_model(config):
        parts |= {f"the {part} of reference_model": value for part, value in model_files(other).items()}
    for other in further_references(config):
        parts |= {f"the {part} of reference {other.name}": value for part, value in model_files(other).items()}
    if oracle:
        parts |= {f"the {part} of dataset.oracle": value for part, value in oracle.model_files().items()}
    return parts


def run(plan: RunPlan, **facts: Any) -> None:
    """Train, and export the policy; `facts` go into the run's record. A finished run is skipped.

    Raises Interrupted, with everything saved, when SIGTERM or SIGUSR2 asks for it, and UserError where another process
    is at work on the run, or its folder cannot be written.
    """
    from prefopt.errors import Interrupted
    from prefopt.tracking.process import release_lock
    from prefopt.training.guards import explain_os_errors
    from prefopt.utils import signals

    run = plan.run
    with explain_os_errors(run):
        if is_main_process() and (run.folder / "record.json").is_file() and not run.finished:
            refuse_active_run(run)
            run.hold()
        signals.install_handlers()
        # The error of one process is recorded inside of the group: leaving it makes it an error of all the others.
        with process_group(plan.config.device, plan.config.engine.name != "single"):
            # Before anything is recorded: the folder of a process with other arguments is another run's.
            check_agreement("were started with different arguments or data", run.identity())
            try:
                run_training(plan, facts)
            except (Interrupted, KeyboardInterrupt) as error:
                run.interrupt(str(error) or "Ctrl-C")
                raise
            except Exception:
                run.fail(traceback.format_exc())
                raise
            finally:
                start_watchdog(None)
                release_lock(run.folder)


def refuse_active_run(run: "Run") -> None:
    """Raise UserError where another process or job is at work on `run`, or will be."""
    from prefopt.tracking.process import ACTIVE_STATES, describe_owner, process_info
    from prefopt.tracking.status import inspect_runs

    (status,) = inspect_runs([run.folder])
    # A queued run is not locked yet by its job, and a requeued stage of an online run still names its Slurm job.
    job = process_info()["slurm_job"]
    ours = status.record.get("pid") == os.getpid() or (job and job == status.record.get("slurm_job"))
    if status.state in ACTIVE_STATES and not ours:
        place = describe_owner(status.record)
        raise UserError(f"{run.folder} is {status.state} already, as {place}. Wait for it, or stop it first.")


def run_training(plan: RunPlan, facts: dict[str, Any]) -> None:
    """Build what the config names, train it in the loop, and export the policy."""
    from prefopt.training.publish import push

    config, run, objective = plan.config, plan.run, plan.objective
    if run.finished:
        skip_finished(run, config)
        if is_main_process():
            push(config.push_to_hub, run.policy_folder)
        return
    announce(plan)

    from prefopt.data.cache import tokenizer_digest
    from prefopt.training.build import (
        build_data,
        build_engine,
        build_layout,
        build_policy,
        build_reference,
        build_router_loss,
        initial_config,
        sample_prompts,
    )
    from prefopt.training.checkpoint import check_space, is_one_adapter, run_bytes, tidy_checkpoints
    from prefopt.training.export import PolicyExporter
    from prefopt.training.going_on import seed
    from prefopt.training.loop import train_loop
    from prefopt.training.model_card import model_card
    from prefopt.training.outlook import memory_line, size_lines
    from prefopt.training.state import TrainState

    shorter = f"lower max_prompt_tokens={config.max_prompt_tokens}, or give fewer rows"
    with memory_for("reading and tokenizing the data", shorter):
        tokenizer, data = build_data(config, objective)
    if config.patience is not None and "heldout" not in data:
        raise UserError(
            "patience watches the held-out loss, and all rows have the same prompt: give dataset.heldout=FILE"
        )
    train_pairs = data["train"].pairs
    heldout_pairs = data["heldout"].pairs[: config.heldout_pairs] if "heldout" in data else []

    began = time.monotonic()
    smaller = "a smaller model.path, or peft=lora_attention with peft.quantize=true"
    with memory_for(f"loading {config.model.path} on {config.device}", smaller):
        policy, digest = build_policy(config, objective, tokenizer)
    # Once more, since other code, or another version of transformers, may read the same files differently.
    loaded = {"its weights as loaded": digest, "its tokenizer as loaded": tokenizer_digest(tokenizer)}
    check_agreement("have read different models", loaded)
    run.refuse_changed_model(loaded)
    if plan.origin:
        plan.origin.check_model(loaded)
    of_adapter = is_one_adapter(config, policy)
    exporter = PolicyExporter(config, tokenizer, lambda rows: model_card(run.record, of_adapter, rows))
    if is_main_process():
        exporter.check(policy)
    with memory_for("making the optimizer", "peft=lora_attention, or engine=fsdp on more GPUs"):
        engine = build_engine(config, objective, policy)
    log_wrapped(log, memory_line(config, engine))
    half = f"micro_batch_tokens={config.micro_batch_tokens // 2}"
    with memory_for("checking the layout on a few pairs", half, smaller), engine.unsharded():
        layout = build_layout(config, policy, digest, train_pairs)

    config.count_steps(len(train_pairs))
    for line in size_lines(config, objective, data["train"], len(heldout_pairs)):
        log_wrapped(log, line)
    counts = {name: split.counts for name, split in data.items()}
    model = model_parts(config, plan.oracle) | loaded
    if not run.begun:
        facts = facts | {"continued_from": plan.origin.facts if plan.origin else None}
    run.start(**facts, config=dataclasses.asdict(config), initial_weights=digest, model=model, data=counts)

    with memory_for("computing the reference", half, "reference=cached", smaller), engine.unsharded():
        models = policy, digest, layout, train_pairs, heldout_pairs
        reference = build_reference(config, objective, *models)
        beside = initial_config(config, objective)
        initial = build_reference(beside, objective, *models) if beside else None
    heldout_prompts = data["heldout"].prompts if "heldout" in data else []
    prompts = sample_prompts(config, objective, policy, tokenizer, heldout_prompts)
    router_loss = build_router_loss(config, policy)
    if is_main_process():
        check_space(run.folder, run_bytes(config, engine))
        if plan.origin:
            seed(run, plan.origin)

    train_state = TrainState(
        config=config,
        run=run,
        objective=objective,
        schedule=plan.schedule,
        engine=engine,
        reference=reference,
        tokenizer=tokenizer,
        train_pairs=train_pairs,
        heldout_pairs=heldout_pairs,
        prompts=prompts,
        oracle=plan.oracle,
        layout=layout,
        export=exporter,
        router_loss=router_loss,
        initial=initial,
    )
    with memory_for("training", half, "gradient_checkpointing=true"):
        trained = train_loop(train_state)

    writing = memory_for("writing the policy", "the same command, which goes on from the last step")
    with writing, engine.gathered() as whole:
        final_weights = exporter.final(whole, run.policy_folder, trained.evaluations) if is_main_process() else None
    if is_main_process():
        run.finish(
            evaluations=trained.evaluations,
            metrics=trained.metrics,
            final_weights=final_weights,
            seconds=time.monotonic() - began,
        )
        tidy_checkpoints(run.checkpoints, config.keep_checkpoint)
        log.info(f"  finished; the policy is in {run.policy_folder}")
        push(config.push_to_hub, run.policy_folder)


def skip_finished(run: "Run", config: TrainConfig) -> None:
    from prefopt.tracking.provenance import note_edited_code
    from prefopt.training.checkpoint import tidy_checkpoints

    if is_main_process():  # a run that was killed right after its end has all its checkpoints still
        tidy_checkpoints(run.checkpoints, config.keep_checkpoint)
        remove(run.folder / "heartbeat")
        if code := run.record.get("code"):
            note_edited_code(Path(code))
    log.info(f"{run.folder}: finished, skipped (remove the folder to run it again)")


def announce(plan: RunPlan) -> None:
    """Say what is going to be trained, before anything that takes time."""
    config = plan.config
    log.info(f"{plan.run.folder}: {config.precision} on {config.device}")
    if plan.origin:
        from prefopt.training.going_on import describe

        for line in describe(plan.origin, config):
            log_wrapped(log, line)
    log.info(f"  objective: {format_objective(plan.objective)}")
    if world_size() > 1:
        log.info(f"  a process that does not get on for engine.hang_s={config.engine.hang_s:g} seconds ends the job")


def format_objective(objective: "Objective") -> str:
    """The objective's hyperparameters, and the values derived from them."""
    derived = ", ".join(f"{name} = {value:g}" for name, value in objective.derived.items())
    return f"{objective!r}: {derived}" if derived else repr(objective)
