"""The parts of a run, made from its config: tokenized data, policy, layout, reference, engine."""

import contextlib
import functools
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch.utils.data import ConcatDataset, Subset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import prefopt.models.reference
from prefopt.config.schema import ModelConfig, ReferenceSyncConfig
from prefopt.data import cache
from prefopt.data.collate import Layout
from prefopt.data.fields import content_id
from prefopt.data.items import Message
from prefopt.data.linked import link
from prefopt.data.mismatch import MismatchedOfRun, with_mismatched
from prefopt.data.sampler import run_indices
from prefopt.data.tokenize import TokenizedPair, encode_prompt
from prefopt.errors import UserError
from prefopt.models import layout_check, load
from prefopt.models.frozen import freeze
from prefopt.models.group_reference import cached_groups
from prefopt.models.logprobs import LogprobComputer
from prefopt.models.lora import (
    adapter_layers,
    add_adapter,
    checkpoint_activations,
    freeze_unreached,
    leaf_name,
)
from prefopt.models.multi_reference import MultiReference
from prefopt.models.packed_attention import enable_packed_attention
from prefopt.models.reference import AdapterOff, Cached, Following, Further, LoadedOnce, Reference, Resident
from prefopt.models.router import RouterLoss, balancing_loss, has_experts
from prefopt.models.value_head import add_value_head
from prefopt.objectives import SIDES
from prefopt.objectives.base import Need, Objective
from prefopt.training.config import TrainConfig
from prefopt.training.engine import Engine
from prefopt.utils.distributed import main_process_first, world_size
from prefopt.utils.memory import keep_freed_memory

log = logging.getLogger(__name__)

LAYOUT_CHECK_PAIRS = 256  # the layout is checked against the model on pairs from these


def build_data(config: TrainConfig, objective: Objective) -> tuple[PreTrainedTokenizerBase, dict[str, cache.Prepared]]:
    """The policy's tokenizer, and the tokenized splits by name ("train", and "heldout" where there is one).

    Reads no weights. Raises UserError for a model that cannot be found, and for rows that model or objective cannot
    take.
    """
    load.check_trainable(config.model)
    max_positions = load.check_model(config.model)
    load.check_decoder(config.model)
    if config.engine.name == "fsdp" and has_experts(load.read_config(config.model)):
        raise UserError(
            f"engine=fsdp does not train a mixture of experts, as {config.model.path} is: use engine=zero2."
        )
    if other := reference_model(config):
        load.check_model(other, "reference_model")
    for other in further_references(config):
        load.check_model(other, "multi_reference.models")
    tokenizer = load.load_tokenizer(config.model)
    with main_process_first():
        data = cache.prepare_dataset(
            config.dataset,
            tokenizer,
            cache.Limits(config.max_prompt_tokens, config.max_completion_tokens),
            functools.partial(check_rewards, objective),
            config.logger.progress,
        )

    longest = max(longest_row(split, objective, max_positions) for split in data.values())
    if max_positions is not None and longest > max_positions:
        raise UserError(
            f"the longest row has {longest} tokens, and {config.model.path} was made for {max_positions} "
            f"(max_position_embeddings). Lower max_prompt_tokens={config.max_prompt_tokens} and "
            f"max_completion_tokens={config.max_completion_tokens}, or take another model."
        )
    check_kind(config, objective, data["train"].counts["kind"])
    for name, split in data.items():
        check_token_weights(objective, name, split.counts)
    if objective.linked:
        data = {name: link(split, f"{name} split of {config.dataset.name}") for name, split in data.items()}
    return tokenizer, data


def check_kind(config: TrainConfig, objective: Objective, kind: str) -> None:
    """Raise UserError where the objective does not read items of this `kind`."""
    if kind == "chats" and "rejected" in objective.completions:
        raise UserError(
            f"objective {objective.name} compares two completions, and {config.dataset.name} holds chats; "
            "objective=sft trains on them."
        )
    if kind == "pairs" and "others" in objective.completions:
        raise UserError(
            f"objective {objective.name} reads all scored responses to a prompt, and {config.dataset.name} holds "
            "pairs: give rows of scored responses (dataset=samples), and dataset.format.pairing=group."
        )
    if kind == "groups" and objective.completions == SIDES:
        raise UserError(
            f"objective {objective.name} compares two completions, and {config.dataset.name} holds groups: give "
            "dataset.format.pairing=best_worst, best_random or all."
        )


def check_token_weights(objective: Objective, split: str, counts: dict[str, Any]) -> None:
    """Raise UserError where the objective needs weights for the tokens of all pairs, and some have none."""
    lacking = counts["items"] - counts["kept"].get("token_weights", 0)
    if "token_weights" in objective.needs and lacking:
        raise UserError(
            f"objective {objective.name} needs weights for the tokens of both completions, and {lacking} of "
            f"{counts['items']} {split} items have none. Give chosen_token_weights and rejected_token_weights in the "
            "rows (other names: dataset.columns); prefopt token_weights writes them."
        )


def longest_row(split: cache.Prepared, objective: Objective, max_positions: int | None) -> int:
    """Tokens of the longest prompt with its longer completion; with mismatched ones, with the longest of all."""
    if max_positions is None or "mismatched" not in objective.needs:
        return split.longest
    lengths = [(len(pair.prompt), max(len(pair.chosen), len(pair.rejected))) for pair in split.pairs]
    return max(prompt for prompt, _ in lengths) + max(completion for _, completion in lengths)


def check_rewards(objective: Objective, split: str, rewards: dict[str, Any]) -> None:
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


def build_policy(
    config: TrainConfig, objective: Objective, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreTrainedModel, str]:
    """The policy, or the reward model, with the weights that training begins from, without its new adapter; and the
    digest of these weights as they were loaded. What an adapter is to lie on is frozen (`models.frozen.freeze`). With
    engine=fsdp the weights are on the CPU of the main process alone, which `build_engine` shares out.

    Raises UserError for a model that cannot be loaded, or that tokenizer or adapter do not fit.
    """
    if config.device == "cpu":
        keep_freed_memory()
    if config.engine.name == "fsdp":
        from prefopt.training.fsdp import from_main

        policy, digest = from_main(functools.partial(load_policy, config, objective))
    else:
        policy, digest = load_policy(config, objective)
        policy = load.finalize(policy, config.device)
    if config.compile:
        load.compile_layers(policy)
    load.check_vocabulary(policy, tokenizer)
    freeze_unreached(policy)
    if config.model.router_aux_loss_coef:
        balancing_loss(policy)  # refuses a model that has none
    if config.peft.target_modules:
        adapter_layers(policy, config.peft)  # refuses unknown layers here, before the reference is computed
    return policy, digest


def load_policy(config: TrainConfig, objective: Objective) -> tuple[PreTrainedModel, str]:
    """The model of `build_policy`, on the CPU unless it is quantized, and its digest."""
    if objective.model_kind == "reward_model":
        policy = load.load_reward_model(config.model, "cpu")
    elif config.peft.quantize:
        policy = load.load_model(config.model, config.device, config.precision)
    else:
        policy = load.load_model(config.model, "cpu")
    digest = load.weights_digest(policy)
    if config.peft.target_modules:
        freeze(policy, config.precision)
    return policy, digest


def sample_prompts(
    config: TrainConfig,
    objective: Objective,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[Message]],
) -> list[list[Message]]:
    """Of the held-out `prompts` those that get a response at each evaluation: the first `sampling.prompts` different
    ones that leave room for it among the model's positions. None for a reward model."""
    wanted = 0 if objective.model_kind == "reward_model" else config.sampling.prompts
    room = getattr(policy.config.get_text_config(), "max_position_embeddings", None) or math.inf
    chosen: list[list[Message]] = []
    seen, too_long = set(), 0
    for prompt in prompts:
        if len(chosen) == wanted:
            break
        if (key := content_id(prompt)) in seen:
            continue
        seen.add(key)
        if len(encode_prompt(tokenizer, prompt)) + config.sampling.max_new_tokens > room:
            too_long += 1
        else:
            chosen.append(prompt)
    if too_long:
        log.info(
            f"  samples: {too_long} held-out prompts get none, since with sampling.max_new_tokens="
            f"{config.sampling.max_new_tokens} they are longer than the model's {room} positions"
        )
    batches = -(-len(chosen) // config.sampling.batch_size)
    if 0 < batches < world_size():
        log.info(
            f"  samples: {batches} of {world_size()} processes draw them; a batch is not shared, so lower "
            f"sampling.batch_size={config.sampling.batch_size}"
        )
    return chosen


def build_layout(config: TrainConfig, policy: PreTrainedModel, digest: str, pairs: Sequence[TokenizedPair]) -> Layout:
    """The configured layout, checked against the model on some of `pairs`. `digest` is that of the policy's weights."""
    return layout_check.known_layout(config.layout, policy, digest, pairs[:LAYOUT_CHECK_PAIRS], config.precision)


def build_reference(
    config: TrainConfig,
    objective: Objective,
    policy: PreTrainedModel,
    digest: str,
    layout: Layout,
    train_pairs: Sequence[TokenizedPair],
    heldout_pairs: Sequence[TokenizedPair],
) -> Reference | None:
    """The configured reference. `policy` has not been trained yet, and `digest` is that of its weights, which a new
    adapter on it does not change.

    Returns None for a reward model. Raises UserError for a reference model that cannot be loaded.
    """
    if objective.model_kind == "reward_model":
        return None
    score = LogprobComputer(config.precision, config.logits == "tiled")
    model = policy
    if config.reference_model:
        model = load_initial(config, layout)
        digest = load.weights_digest(model)
        check_same_vocabulary(f"reference_model={config.reference_model}", model, policy)
    if config.reference_sync.every:
        return Following.starting_at(policy, score, config.reference_sync.every, config.reference_sync.alpha)
    if config.reference == "resident":
        return Resident(load_initial(config, layout) if model is policy else model, score)
    if config.reference == "adapter_off":
        return AdapterOff(policy, score)

    samples: AdapterOff | LoadedOnce = LoadedOnce(functools.partial(load_initial, config, layout), config.device)
    if config.peft.target_modules and not config.reference_model:
        samples = AdapterOff(policy, score)
    if "rejected" not in objective.completions:
        return Cached(samples)  # such an objective compares no pairs: the reference scores samples only

    pairs = reference_pairs(config, objective, train_pairs, heldout_pairs)
    show = config.logger.progress
    names: dict[Need, Further] = {"prefixes": "prefixes", "token_weights": "weighted"}
    further = [name for need, name in names.items() if need in objective.needs]

    def cached(model: PreTrainedModel, digest: str) -> Cached:
        tokens = config.micro_batch_tokens
        if "others" in objective.completions:
            each = "tokens" in objective.needs
            return cached_groups(model, digest, pairs, layout, tokens, score, samples, each, show)
        return prefopt.models.reference.cached(model, digest, pairs, layout, tokens, score, samples, show, further)

    with samples.model() if isinstance(samples, AdapterOff) else contextlib.nullcontext():
        members = [cached(model, digest)]
    for other in further_references(config):
        log.info(f"  reference {other.name}")
        model = load_frozen(config, other, layout)
        check_same_vocabulary(f"multi_reference.models: {other.path}", model, policy)
        members.append(cached(model, load.weights_digest(model)))
    return MultiReference(members, config.multi_reference) if len(members) > 1 else members[0]


def reference_pairs(
    config: TrainConfig,
    objective: Objective,
    train_pairs: Sequence[TokenizedPair],
    heldout_pairs: Sequence[TokenizedPair],
) -> Any:
    """The pairs that a run asks its reference for, as a sequence that reads them one by one from the disk: all of them
    may be more than the memory holds."""
    indices: Sequence[int] = []
    # Otherwise for evaluations only.
    if "reference" in objective.needs or ("initial" in objective.needs and not config.reference_model):
        indices = run_indices(len(train_pairs), config.seed, config.total_steps, config.batch_size, objective.linked)
    parts: list[Any] = [heldout_pairs, Subset(train_pairs, indices)]  # type: ignore[arg-type]  # any sequence will do
    if "mismatched" in objective.needs:
        parts.append([pair.mismatched for pair in with_mismatched(heldout_pairs)])
        parts.append(MismatchedOfRun(train_pairs, config.seed, config.total_steps, config.batch_size))
    return ConcatDataset(parts)


def check_same_vocabulary(key: str, model: PreTrainedModel, policy: PreTrainedModel) -> None:
    """Raise UserError where a reference, which the user named by `key`, has another vocabulary than the policy."""
    if model.config.get_text_config().vocab_size != policy.config.get_text_config().vocab_size:
        raise UserError(f"{key} has another vocabulary than the policy: give a model of the same family.")


def further_references(config: TrainConfig) -> list[ModelConfig]:
    """The models of `multi_reference`."""
    return [ModelConfig(path, path, None) for path in config.multi_reference.models]


def initial_config(config: TrainConfig, objective: Objective) -> TrainConfig | None:
    """`config` with the policy as it is for a reference, where the objective needs that beside a reference that is
    another model or moves; else None."""
    if "initial" not in objective.needs or not (config.reference_model or config.reference_sync.every):
        return None
    return replace(config, reference_model=None, reference_sync=ReferenceSyncConfig())


def reference_model(config: TrainConfig) -> ModelConfig | None:
    """The model that `reference_model` names; None where the reference is the initial policy."""
    return ModelConfig(config.reference_model, config.reference_model, None) if config.reference_model else None


def load_initial(config: TrainConfig, layout: Layout) -> PreTrainedModel:
    """Load the reference's model, frozen: `reference_model`, or the policy as it is before its first step."""
    return load_frozen(config, reference_model(config), layout)


def load_frozen(config: TrainConfig, other: ModelConfig | None, layout: Layout) -> PreTrainedModel:
    """Load `other`, or the policy as it is before its first step, frozen, as `layout` wants it."""
    if config.peft.quantize and not other:
        model = load.load_model(config.model, config.device, config.precision)
    else:
        model = load.load_model(other or config.model, "cpu")
    model = load.finalize(freeze(model, config.precision), config.device)
    if layout.name == "packed":
        enable_packed_attention(model)
    return model


def build_router_loss(config: TrainConfig, policy: PreTrainedModel) -> RouterLoss | None:
    """The load-balancing loss of a mixture of experts, where model.router_aux_loss_coef asks for it; says whether."""
    coef = config.model.router_aux_loss_coef
    if has_experts(policy.config):
        what = f"added, times model.router_aux_loss_coef={coef:g}" if coef else "none (model.router_aux_loss_coef=0)"
        log.info(f"  mixture of experts: load-balancing loss {what}")
    return RouterLoss(policy, coef) if coef else None


def build_engine(config: TrainConfig, objective: Objective, policy: PreTrainedModel) -> Engine:
    """Make `policy` trainable, with its new adapter, the value head that the objective needs and activation
    checkpointing, and give it an optimizer."""
    if config.peft.target_modules:
        add_adapter(policy, config.peft, config.seed)
    if "values" in objective.needs:
        add_value_head(policy)
    log.info(f"  {format_trained(config, policy)}")
    if config.gradient_checkpointing:
        checkpoint_activations(policy)
    if config.engine.name == "single":
        return Engine(policy, config.optimizer)
    if config.engine.name == "fsdp":
        from prefopt.training.fsdp import Fsdp

        return Fsdp(policy, config.optimizer, config.precision, config.device)
    from prefopt.training.zero2 import Zero2

    return Zero2(policy, config.optimizer, config.engine.offload_optimizer, config.precision)


def format_trained(config: TrainConfig, policy: PreTrainedModel) -> str:
    """How many of the policy's weights are trained; with an adapter, also on how many layers it lies."""
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    # Weights in 4 bits lie two in a byte.
    frozen = [
        (p.numel() * 2 if hasattr(p, "quant_state") else p.numel()) for p in policy.parameters() if not p.requires_grad
    ]
    text = f"trained: {trained:,} of {trained + sum(frozen):,} parameters ({trained / (trained + sum(frozen)):.2%})"
    if config.peft.target_modules:
        names = [name for name, module in policy.named_modules() if hasattr(module, "lora_A")]
        if config.model.resize_embeddings:
            text += "; the new embeddings are frozen"
        text += f", an adapter on {len(names)} layers ({', '.join(sorted(set(map(leaf_name, names))))})"
    return text
