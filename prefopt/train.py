"""Train one policy, or one per point of a grid.

    python -m prefopt.train objective=dpo objective.beta=0.1
    python -m prefopt.train -m objective=dpo,mmpo objective.beta=0.05,0.5

A run that is finished is skipped, one that was interrupted goes on from its last checkpoint.
"""

import copy
import math
import shutil
import time
import traceback
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from prefopt import UserError
from prefopt.config import TrainConfig, build, check, parse, resolve_hardware
from prefopt.program import program

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from prefopt.data.formats import Split
    from prefopt.data.tokenize import TokenizedPair
    from prefopt.objectives.base import Objective


def train(cfg: DictConfig) -> None:
    """Validate, build, loop, export. Everything that can be refused is refused before the model is loaded."""
    from prefopt.data.formats import load_split
    from prefopt.loggers import check_logger
    from prefopt.objectives.base import Objective
    from prefopt.optim import Schedule
    from prefopt.posthoc.oracle import Oracle
    from prefopt.progress import say
    from prefopt.run import Run

    config = parse(cfg, TrainConfig)
    check(config)
    resolve_hardware(config)
    objective = build(config.objective, Objective, "objective")
    schedule = build(config.schedule, Schedule, "schedule")
    oracle = build(config.dataset.oracle, Oracle, "dataset.oracle") if config.dataset.oracle else None
    if objective.trains == "reward_model":
        oracle = None  # it draws no samples
    check_logger(config.logger)
    names = ["train", "heldout"] if config.dataset.heldout else ["train"]
    splits = {name: load_split(config.dataset, name) for name in names}
    check_objective(objective, splits)

    run = Run(config, objective.name, {name: split.digest for name, split in splits.items()})
    if run.finished:
        say(f"{run.folder}: finished, skipped (remove the folder to run it again)")
        return
    say(f"{run.folder}: {config.steps} steps of {config.batch_size} pairs, {config.precision} on {config.device}")
    say(f"  objective: {describe(objective)}")

    from prefopt.models.load import (
        check_model,
        check_vocabulary,
        load_model,
        load_reward_model,
        load_tokenizer,
        weights_digest,
    )

    check_model(config.model)
    tokenizer = load_tokenizer(config.model)
    tokenized, counts = {}, {}
    for name, split in splits.items():
        tokenized[name], counts[name] = tokenize(name, split, tokenizer, config)

    from prefopt.checkpoint import export
    from prefopt.data.layout import chosen_only
    from prefopt.engine import Engine, keep_freed_memory
    from prefopt.loop import Job
    from prefopt.loop import train as loop
    from prefopt.models.probe import choose_layout

    began = time.monotonic()
    if config.device == "cpu":
        keep_freed_memory()
    reward_model = objective.trains == "reward_model"
    policy = (load_reward_model if reward_model else load_model)(config.model, config.device)
    check_vocabulary(policy, tokenizer)
    digest = weights_digest(policy)
    if run.record.get("initial_weights", digest) != digest:
        raise UserError(
            f"{run.folder} was begun from other weights than model.path={config.model.path} holds now. Remove the "
            "folder to begin again, or bring the old weights back."
        )
    run.start(initial_weights=digest, data=counts)
    reference = None if reward_model else copy.deepcopy(policy).requires_grad_(False)
    engine = Engine(policy, config.optimizer, config.precision)
    layout = chosen_only if objective.sides == ("chosen",) else choose_layout(config.layout, policy, tokenized["train"])
    heldout = tokenized.get("heldout", [])[: config.heldout_pairs]
    prompts = [pair.prompt for pair in splits["heldout"].pairs] if oracle else []
    job = Job(
        config,
        run,
        objective,
        schedule,
        engine,
        reference,
        tokenizer,
        tokenized["train"],
        heldout,
        prompts,
        oracle,
        layout,
    )
    try:
        evaluations = loop(job)
        export(policy, tokenizer, run.policy_folder)
    except Exception:
        run.fail(traceback.format_exc())
        raise
    run.finish(evaluations=evaluations, final_weights=weights_digest(policy), seconds=time.monotonic() - began)
    shutil.rmtree(run.checkpoints, ignore_errors=True)
    say(f"  finished; the policy is in {run.policy_folder}")


def check_objective(objective: "Objective", splits: dict[str, "Split"]) -> None:
    """Raise UserError for a need of the objective that the data cannot serve."""
    for name, split in splits.items() if "rewards" in objective.needs else []:
        lacking = sum(p.chosen_reward is None or p.rejected_reward is None for p in split.pairs)
        if lacking:
            raise UserError(
                f"objective {objective.name} needs the prior rewards of both completions, and {lacking} of "
                f"{len(split.pairs)} {name} pairs have none. Give chosen_reward and rejected_reward in the rows, or "
                "responses with rewards (dataset.format ScoredResponses)."
            )
        low, high = objective.reward_range or (-math.inf, math.inf)
        for pair in split.pairs:
            for reward in (pair.chosen_reward, pair.rejected_reward):
                if reward is not None and not low <= reward <= high:
                    raise UserError(
                        f"objective {objective.name} needs rewards in [{low:g}, {high:g}]; {pair.id} of the {name} "
                        f"split has {reward:g}. Bring them there: a reward model's raw outputs r by 1 / (1 + exp(-r)), "
                        "scores from 1 to 10 by (r - 1) / 9."
                    )


def describe(objective: "Objective") -> str:
    """Hyperparameters, and what follows from them."""
    derived = ", ".join(f"{name} = {value:g}" for name, value in objective.derived.items())
    return f"{objective!r}" + (f": {derived}" if derived else "")


def tokenize(
    name: str, split: "Split", tokenizer: "PreTrainedTokenizerBase", config: TrainConfig
) -> tuple[list["TokenizedPair"], dict[str, Any]]:
    """The split's tokenized pairs and the counts for the record. Raises UserError where no pair is left."""
    from prefopt.data.tokenize import tokenize_pairs
    from prefopt.progress import say

    pairs, drops = tokenize_pairs(tokenizer, split.pairs, config.max_prompt_tokens, config.max_completion_tokens)
    drops += split.drops
    dropped = ", ".join(f"{reason} {n}" for reason, n in drops.items()) or "none"
    say(f"  {name}: {len(pairs)} pairs; dropped: {dropped}")
    if not pairs:
        raise UserError(
            f"no pair is left of the {name} split ({dropped}). Raise max_prompt_tokens={config.max_prompt_tokens}, "
            "or look at the data."
        )
    return pairs, {"pairs": len(pairs), "dropped": dict(drops)}


@program("train")
def main(cfg: DictConfig) -> None:
    train(cfg)


if __name__ == "__main__":
    main()
