"""From a config to a finished run: build the components, hand them to the loop, export the policy."""

import dataclasses
import functools
import importlib.util
import math
import os
import shutil
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.version import Version

from prefopt.config.parse import build
from prefopt.config.schema import EngineConfig, ModelConfig
from prefopt.errors import UserError
from prefopt.training.config import TrainConfig
from prefopt.training.guards import explain_os_errors
from prefopt.utils.distributed import is_main_process, main_process_first, process_group, start_watchdog, world_size
from prefopt.utils.files import check_folder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from prefopt.data.collate import Layout
    from prefopt.data.tokenize import TokenizedPair
    from prefopt.models.reference import Reference
    from prefopt.objectives.base import Objective
    from prefopt.rewards.oracle import Oracle
    from prefopt.tracking.run import Run
    from prefopt.training.optim import Schedule


@dataclass
class RunPlan:
    """What a config asks for, checked and built as far as that goes without reading data or weights."""

    config: TrainConfig
    objective: "Objective"
    schedule: "Schedule"
    oracle: "Oracle | None"
    run: "Run"


def build_components(config: TrainConfig) -> "tuple[Objective, Schedule, Oracle | None]":
    """Everything that can be refused without the data is refused here, with UserError. `config` is one that `check` has
    passed and whose hardware is resolved."""
    from prefopt.data.dataset import check_dataset, has_heldout
    from prefopt.data.hub import missing
    from prefopt.errors import MissingAssetError
    from prefopt.objectives.base import Objective
    from prefopt.rewards.oracle import Oracle
    from prefopt.training.loggers import check_logger
    from prefopt.training.optim import Schedule, check_optimizer

    objective = build(config.objective, Objective, "objective")
    schedule = build(config.schedule, Schedule, "schedule")
    oracle = build(config.dataset.oracle, Oracle, "dataset.oracle") if config.dataset.oracle else None
    if objective.model_kind == "reward_model":
        oracle = None  # it draws no samples
    size = objective.micro_batch_size
    if objective.scope == "micro_batch" and size and config.batch_size % size:
        raise UserError(f"batch_size={config.batch_size} must be a multiple of objective.micro_batch_size={size}.")
    check_optimizer(config.optimizer)
    check_engine(config.engine, config.device)
    check_logger(config.logger)
    check_dataset(config.dataset)
    check_folder("runs_dir", config.runs_dir)
    if config.peft.path and not (Path(config.peft.path) / "adapter_config.json").is_file():
        raise UserError(f"peft.path={config.peft.path} is no adapter: it holds no adapter_config.json.")
    if config.peft.path and not (Path(config.peft.path) / "adapter_model.safetensors").is_file():
        raise UserError(
            f"peft.path={config.peft.path} holds no adapter_model.safetensors; adapter_model.bin would be a pickle, "
            "which could run any code and is not read. Save the adapter again with peft 0.7 or later."
        )
    if config.peft.quantize and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("peft.quantize needs the package bitsandbytes: pip install -e '.[bitsandbytes]'")
    if config.peft.quantize and objective.model_kind == "reward_model":
        raise UserError(f"objective {objective.name} cannot be trained on weights of 4 bits: set peft.quantize=false.")
    if config.patience is not None and not has_heldout(config.dataset):
        raise UserError("patience watches the held-out loss, and dataset.heldout is null: give a file")
    if config.reference_model and objective.model_kind == "reward_model":
        raise UserError(
            f"objective {objective.name} trains a reward model, which has no reference_model: leave it out."
        )
    if lacking := missing(config.model, config.dataset):
        raise MissingAssetError("\n".join(lacking))
    return objective, schedule, oracle


def prepare_run(config: TrainConfig) -> RunPlan:
    """Build the components, and identify the run by its config and data. Starts the watchdog.

    Raises UserError for what can be refused before data and weights are read.
    """
    from prefopt.data.dataset import has_heldout, split_digest
    from prefopt.tracking.run import Run

    objective, schedule, oracle = build_components(config)
    start_watchdog(config.engine.hang_s)
    names = ["train", "heldout"] if has_heldout(config.dataset) else ["train"]
    run = Run.open(
        dataclasses.asdict(config), objective.name, {name: split_digest(config.dataset, name) for name in names}
    )
    return RunPlan(config, objective, schedule, oracle, run)


def check_engine(config: EngineConfig, device: str) -> None:
    """Raise UserError where the engine lacks its package, or this process was started beside others that it ignores."""
    if world_size() > 1 and ":" in device:
        raise UserError(f"device={device} would be the GPU of all {world_size()} processes. Give device=cuda.")
    if config.name == "single" and world_size() > 1:
        raise UserError(
            f"this was started as {world_size()} processes (WORLD_SIZE), and engine=single trains in one: add "
            "engine=zero2, or start one."
        )
    if config.name == "zero2":
        # 0.17.6 to 0.18.2 compute wrong gradients at stage 2; caller-owned accumulation came with 0.19.
        try:
            found = importlib.metadata.version("deepspeed")
        except importlib.metadata.PackageNotFoundError:
            found = "none"
        if found == "none" or Version(found) < Version("0.19.8"):
            raise UserError(
                f"engine=zero2 needs the package deepspeed, 0.19.8 or later; there is {found}: pip install "
                "-e '.[deepspeed]'"
            )


def run(plan: RunPlan, **facts: Any) -> None:
    """Build, loop, export; `facts` go into the run's record.

    Raises stop.Interrupted, with everything saved, when SIGTERM or SIGUSR2 asks for it, and UserError where the run is
    under way elsewhere, or its folder cannot be written.
    """
    from prefopt.errors import Interrupted
    from prefopt.tracking.process import ACTIVE_STATES, describe_owner, process_info, release_lock
    from prefopt.tracking.status import inspect_runs
    from prefopt.utils import signals

    run = plan.run
    with explain_os_errors(run):
        if is_main_process() and (run.folder / "record.json").is_file() and not run.finished:
            (found,) = inspect_runs([run.folder])
            # Queued, it does not hold it yet; a stage of an online run is left as requeued by its own Slurm job.
            job = process_info()["slurm_job"]
            ours = found.record["pid"] == os.getpid() or (job and job == found.record.get("slurm_job"))
            if found.state in ACTIVE_STATES and not ours:
                place = describe_owner(found.record)
                raise UserError(f"{run.folder} is {found.state} already, as {place}. Wait for it, or stop it first.")
            run.hold()
        signals.install_handlers()
        # What a process has to say is written down before its end becomes an error of all the others.
        with process_group(plan.config.device, plan.config.engine.name != "single"):
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


def run_training(plan: RunPlan, facts: dict[str, Any]) -> None:
    from prefopt.utils.console import say

    config, run, objective, oracle = plan.config, plan.run, plan.objective, plan.oracle
    reward_model = objective.model_kind == "reward_model"
    if run.finished:
        if is_main_process():  # it may have been killed just before it did so itself
            shutil.rmtree(run.checkpoints, ignore_errors=True)
        say(f"{run.folder}: finished, skipped (remove the folder to run it again)")
        return
    length = f"{config.steps} steps" if config.epochs is None else f"{config.epochs:g} epochs"
    say(f"{run.folder}: {length} of {config.batch_size} pairs a step, {config.precision} on {config.device}")
    say(f"  objective: {format_objective(objective)}")
    if world_size() > 1:
        say(f"  a process that does not get on for engine.hang_s={config.engine.hang_s:g} seconds ends the job")

    from prefopt.data.cache import Limits, prepare_dataset
    from prefopt.models.load import (
        check_model,
        check_vocabulary,
        compile_layers,
        load_model,
        load_reward_model,
        load_tokenizer,
        weights_digest,
    )

    positions = check_model(config.model)
    if config.reference_model:
        check_model(ModelConfig(config.reference_model, config.reference_model, None), "reference_model")
    tokenizer = load_tokenizer(config.model)
    with main_process_first():
        data = prepare_dataset(
            config.dataset,
            tokenizer,
            Limits(config.max_prompt_tokens, config.max_completion_tokens),
            functools.partial(check_rewards, objective),
            config.logger.progress,
        )
    longest = max(split.longest for split in data.values())
    if positions is not None and longest > positions:
        raise UserError(
            f"the longest row has {longest} tokens, and {config.model.path} was made for {positions} "
            f"(max_position_embeddings). Lower max_prompt_tokens={config.max_prompt_tokens} and "
            f"max_completion_tokens={config.max_completion_tokens}, or take another model."
        )
    if data["train"].counts["kind"] == "chats" and "rejected" in objective.completions:
        raise UserError(f"objective {objective.name} compares two completions, and {config.dataset.name} holds chats.")

    from prefopt.models.layout_check import choose_layout
    from prefopt.models.lora import (
        adapter_layers,
        add_adapter,
        checkpoint_activations,
        merge,
        merge_adapter,
        save_adapter,
    )
    from prefopt.training.checkpoint import KEPT, check_space, export
    from prefopt.training.engine import Engine
    from prefopt.training.loop import train_loop as loop
    from prefopt.training.state import TrainState
    from prefopt.utils.memory import keep_freed_memory

    began = time.monotonic()
    if config.device == "cpu":
        keep_freed_memory()
    if reward_model:
        policy = load_reward_model(config.model, config.device)
    else:
        policy = load_model(config.model, config.device, config.precision if config.peft.quantize else None)
    if config.compile:
        compile_layers(policy)
    check_vocabulary(policy, tokenizer)
    if config.peft.path:
        merge_adapter(policy, config.peft.path)
    if config.peft.target_modules:
        adapter_layers(policy, config.peft)
    digest = weights_digest(policy)
    if run.record.get("initial_weights", digest) != digest:
        raise UserError(
            f"{run.folder} was begun from other weights than model.path={config.model.path} holds now. Remove the "
            "folder to begin again, or bring the old weights back."
        )
    layout = choose_layout(config.layout, policy, data["train"].pairs[:256], config.precision)
    config.count_steps(len(data["train"].pairs))
    facts |= {"config": dataclasses.asdict(config)}
    run.start(**facts, initial_weights=digest, data={name: split.counts for name, split in data.items()})
    heldout = data["heldout"].pairs[: config.heldout_pairs] if "heldout" in data else []
    with main_process_first():
        reference = make_reference(config, objective, policy, digest, layout, data["train"].pairs, heldout)
    if config.peft.target_modules:
        add_adapter(policy, config.peft, config.seed)
    if config.gradient_checkpointing:
        checkpoint_activations(policy)
    engine: Engine
    if config.engine.name == "zero2":
        from prefopt.training.zero2 import Zero2

        engine = Zero2(policy, config.optimizer, config.engine.offload_optimizer)
    else:
        engine = Engine(policy, config.optimizer)
    if is_main_process():
        # Exports are float32, and a byte of a quantized weight holds two.
        weights = 4 * sum(p.numel() * (2 if p.element_size() == 1 else 1) for p in policy.parameters())
        trained = sum(p.numel() for p in engine.parameters.values())
        # Weights and both moments of each number in training, and the best weights beside them.
        checkpoint = trained * (4 + (2 if config.optimizer.eight_bit else 8) + (0 if config.patience is None else 4))
        saved = min(KEPT + 1, max(1, (config.total_steps - 1) // config.save_every))
        check_space(run.folder, checkpoint * saved + weights * config.exports)
    prompts = data["heldout"].prompts if oracle else []

    def write_policy(target: Path, last: bool = False) -> str:
        """With its adapter merged, and by itself in adapter/; the digest of what is written."""
        whole = policy
        if config.peft.target_modules:
            save_adapter(policy, run.folder / "adapter")
            if last and not config.peft.quantize:
                merge(policy)
            else:  # the policy goes on with its adapter, or its weights of 4 bits would be rounded again
                whole = load_model(config.model, "cpu")
                if config.peft.path:
                    merge_adapter(whole, config.peft.path)
                merge_adapter(whole, str(run.folder / "adapter"))
        export(whole, tokenizer, target)
        return weights_digest(whole)

    job = TrainState(
        config,
        run,
        objective,
        plan.schedule,
        engine,
        reference,
        tokenizer,
        data["train"].pairs,
        heldout,
        prompts,
        oracle,
        layout,
        write_policy,
    )
    evaluations = loop(job)
    if not is_main_process():
        return
    final = write_policy(run.policy_folder, last=True)
    run.finish(evaluations=evaluations, final_weights=final, seconds=time.monotonic() - began)
    shutil.rmtree(run.checkpoints, ignore_errors=True)
    say(f"  finished; the policy is in {run.policy_folder}")


def make_reference(
    config: TrainConfig,
    objective: "Objective",
    policy: "PreTrainedModel",
    digest: str,
    layout: "Layout",
    train_pairs: "Sequence[TokenizedPair]",
    heldout: "Sequence[TokenizedPair]",
) -> "Reference | None":
    """The reference that the config names, before the policy (with weights `digest`) is trained.

    Raises UserError for a reference model that cannot be loaded.
    """
    from torch.utils.data import ConcatDataset, Subset

    from prefopt.data.sampler import run_indices
    from prefopt.models.load import weights_digest
    from prefopt.models.logprobs import LogprobComputer
    from prefopt.models.reference import SIDES, AdapterOff, Cached, Resident, cached

    if objective.model_kind == "reward_model":
        return None
    score = LogprobComputer(config.precision, config.logits == "tiled")
    model = policy
    if config.reference_model:
        model = load_initial(config, layout)
        digest = weights_digest(model)
        if model.config.vocab_size != policy.config.vocab_size:
            raise UserError(
                f"reference_model={config.reference_model} has another vocabulary than the policy: give a model of the "
                "same family."
            )
    if config.reference == "resident":
        return Resident.copy_of(policy, score) if model is policy else Resident(model.requires_grad_(False), score)
    if config.reference == "adapter_off":
        return AdapterOff(policy, score)

    load = functools.partial(load_initial, config, layout)
    if objective.completions != SIDES:
        return Cached(load)  # it compares nothing; there are samples alone to score
    indices = run_indices(len(train_pairs), config.seed, config.total_steps, config.batch_size)
    parts: list[Any] = [heldout, Subset(train_pairs, indices if "reference" in objective.needs else [])]  # type: ignore[arg-type]
    pairs: Any = ConcatDataset(parts)  # read one by one: they may be more than the memory holds
    tokens, show = config.micro_batch_tokens, config.logger.progress
    return cached(model, digest, pairs, layout, tokens, score, load, show)


def load_initial(config: TrainConfig, layout: "Layout") -> "PreTrainedModel":
    """The reference's model: `reference_model`, or the policy as it is before its first step."""
    from prefopt.models.load import load_model
    from prefopt.models.lora import merge_adapter
    from prefopt.models.packed_attention import enable_packed_attention

    other = config.reference_model
    quantize = config.precision if config.peft.quantize and not other else None
    model = load_model(ModelConfig(other, other, None) if other else config.model, config.device, quantize)
    if config.peft.path and not other:
        merge_adapter(model, config.peft.path)
    if layout.name == "packed":
        enable_packed_attention(model)
    return model


def check_rewards(objective: "Objective", split: str, rewards: dict[str, Any]) -> None:
    """Raise UserError where the objective needs other prior rewards than the split has (`Split.rewards`)."""
    if "rewards" not in objective.needs:
        return
    if rewards["lacking"]:
        raise UserError(
            f"objective {objective.name} needs the prior rewards of both completions, and {rewards['lacking']} of "
            f"{rewards['items']} {split} items have none. Give chosen_reward and rejected_reward in the rows (other "
            "names: dataset.columns), or responses with rewards (dataset.format ScoredResponses)."
        )
    low, high = objective.reward_range or (-math.inf, math.inf)
    for reward, item in (rewards["low"], rewards["high"]):
        if not low <= reward <= high:
            raise UserError(
                f"objective {objective.name} needs rewards in [{low:g}, {high:g}]; {item} of the {split} split has "
                f"{reward:g}. For scores with known ends set dataset.reward_scale=[lowest,highest]. Beside a reward "
                "model's raw outputs prefopt.score writes them on [0, 1]: +dataset.columns.rewards=rewards_01, or of "
                "pairs +dataset.columns.chosen_reward=chosen_reward_01 and "
                "+dataset.columns.rejected_reward=rejected_reward_01."
            )


def format_objective(objective: "Objective") -> str:
    """Hyperparameters, and what follows from them."""
    derived = ", ".join(f"{name} = {value:g}" for name, value in objective.derived.items())
    return f"{objective!r}" + (f": {derived}" if derived else "")
