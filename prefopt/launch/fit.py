"""Whether a training job fits into the memory of its device, for the dry run of a sweep. Nothing is loaded: a step is
traced (`training.memory`) over pairs of the data's mean lengths, and over the longest that the limits let pass."""

import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from prefopt.config.schema import ModelConfig, PeftConfig
from prefopt.errors import UserError
from prefopt.launch.estimate import rows
from prefopt.training.config import TrainConfig
from prefopt.utils.console import console, rows_table

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from prefopt.data.tokenize import TokenizedPair
    from prefopt.objectives.base import Objective
    from prefopt.training.memory import StepMemory

log = logging.getLogger(__name__)

USABLE = 0.9  # of a device's memory: CUDA takes some for itself, and some lies idle between tensors
MOST_TOKENS = 2**18
# Shapes of models that may not be on this machine yet, by what their names begin with: hidden and intermediate size,
# layers, heads, key heads, vocabulary, whether the head is the embeddings, and the architecture.
KNOWN = {
    "smollm2-135m": (576, 1536, 30, 9, 3, 49152, True, "llama"),
    "smollm2-360m": (960, 2560, 32, 15, 5, 49152, True, "llama"),
    "smollm2-1.7b": (2048, 8192, 24, 32, 32, 49152, True, "llama"),
    "llama-3.2-1b": (2048, 8192, 16, 32, 8, 128256, True, "llama"),
    "llama3.2-1b": (2048, 8192, 16, 32, 8, 128256, True, "llama"),
    "llama-3.2-3b": (3072, 8192, 28, 24, 8, 128256, True, "llama"),
    "llama-3-8b": (4096, 14336, 32, 32, 8, 128256, False, "llama"),
    "llama-3-base-8b": (4096, 14336, 32, 32, 8, 128256, False, "llama"),
    "meta-llama-3-8b": (4096, 14336, 32, 32, 8, 128256, False, "llama"),
    "llama-3.1-8b": (4096, 14336, 32, 32, 8, 128256, False, "llama"),
    "mistral-7b": (4096, 14336, 32, 32, 8, 32768, False, "mistral"),
    "qwen2.5-0.5b": (896, 4864, 24, 14, 2, 151936, True, "qwen2"),
    "qwen2.5-1.5b": (1536, 8960, 28, 12, 2, 151936, True, "qwen2"),
    "qwen2.5-3b": (2048, 11008, 36, 16, 2, 151936, True, "qwen2"),
    "qwen2.5-7b": (3584, 18944, 28, 28, 4, 152064, False, "qwen2"),
    "qwen2.5-14b": (5120, 13824, 48, 40, 8, 152064, False, "qwen2"),
    "qwen2.5-32b": (5120, 27648, 64, 40, 8, 152064, False, "qwen2"),
}
# What makes a step smaller, from the least change of the training to the largest.
CHECKPOINTED = {"gradient_checkpointing": True}
ADAPTER = {"peft": PeftConfig(["q_proj", "k_proj", "v_proj", "o_proj"], 64, 64, 0.01, False)}
REMEDIES: dict[str, dict[str, Any]] = {
    "gradient_checkpointing=true": CHECKPOINTED,
    "peft=lora_attention": ADAPTER,
    "peft=lora_attention gradient_checkpointing=true": ADAPTER | CHECKPOINTED,
}


@dataclass(frozen=True)
class Fit:
    """What a job takes on its device, and whether it fits.

    `memory` is that of its largest micro-batch, `longest_row` the most tokens that a pair may have in its rows.
    `largest` is the largest micro_batch_tokens, among the powers of two times the configured one, with which it fits:
    None where it does not fit with any, or where the device's memory is not known. `remedies` are then changes, and the
    bytes that the job takes with them.
    """

    memory: "StepMemory"
    longest_row: int
    largest: int | None
    remedies: dict[str, int]


def same_memory(config: TrainConfig, objective: "Objective") -> str:
    """The same text for jobs that take the same memory, which those of a sweep over rates or betas do."""
    names = ["dataset", "peft", "engine", "precision", "device", "layout", "logits", "reference", "batch_size"]
    names += ["gradient_checkpointing", "micro_batch_tokens", "max_prompt_tokens", "max_completion_tokens"]
    values = asdict(config)
    decides = {name: values[name] for name in names} | {"eight_bit": config.optimizer.eight_bit}
    model = [config.model.path, config.model.revision, config.model.resize_embeddings]
    kind = [objective.model_kind, objective.scope, objective.micro_batch_size, objective.completions]
    return json.dumps([decides, model, kind, sorted(objective.needs)], default=str)


def fit(config: TrainConfig, objective: "Objective", memory_gib: float | None, processes: int) -> Fit | None:
    """What a job takes on a device of `memory_gib`, as one of `processes`. None where the shape of its model is not
    known, or it cannot be traced."""
    values = shape(config.model)
    if values is None:
        return None
    try:
        return _Job(config, objective, values, processes).fit(memory_gib)
    except Exception as error:  # also what code of an architecture raises that reads values: these tensors have none
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        log.warning(f"  no memory is estimated for {config.model.path}: {reason}")
        return None


def shape(model: ModelConfig) -> "PreTrainedConfig | None":
    """The configuration of a model; of one that is not on this machine, that of its name in KNOWN."""
    from transformers import AutoConfig

    from prefopt.models.load import read_config

    with contextlib.suppress(UserError):
        return read_config(model)
    for name in [*reversed(model.path.lower().split("/")), model.name.lower()]:
        known = [key for key in KNOWN if name.startswith(key)]
        if known:
            hidden, inner, layers, heads, key_heads, vocabulary, tied, kind = KNOWN[max(known, key=len)]
            return AutoConfig.for_model(
                kind,
                hidden_size=hidden,
                intermediate_size=inner,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                num_key_value_heads=key_heads,
                vocab_size=vocabulary,
                tie_word_embeddings=tied,
                max_position_embeddings=2**20,
            )
    return None


def print_memory(fits: Sequence[tuple[list[str], Fit | None]], memory_gib: float | None) -> None:
    """Print what jobs take on their device, a row for those that take the same, and what helps those that do not fit.
    `memory_gib` is that of the device."""
    rows, remedies = [], []
    for names, found in fits:
        name = ", ".join(dict.fromkeys(names)) + (f" ({len(names)} jobs)" if len(names) > 1 else "")
        if found is None:
            rows.append([name, *"––––––", "its shape is not known"])
            continue
        step = found.memory
        kinds = (step.weights, step.gradients, step.optimizer, step.activations, step.total)
        if found.largest:
            verdict = f"fits; micro_batch_tokens up to {found.largest}"
        else:
            verdict = "–" if memory_gib is None else "does not fit"
        rows.append([name, *(f"{kind / 2**30:.3g}" for kind in kinds), str(found.longest_row), verdict])
        if found.remedies:
            changes = "; ".join(f"{change}: {taken / 2**30:.3g} GiB" for change, taken in found.remedies.items())
            remedies.append(f"{name} needs a larger device, or at the smallest micro-batch {changes}")
    device = "not known (launcher.gpu_memory_gib)" if memory_gib is None else f"{memory_gib:.3g} GiB"
    caption = (
        "A step on tensors without values: its fullest micro-batch, or the longest row that the limits let pass. A job "
        f"fits where it takes at most nine tenths of the device's memory, which is {device}."
    )
    headings = (
        "model and objective",
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "in all",
        "longest row, tokens",
        "micro-batches",
    )
    console().print(rows_table(headings, rows, "Memory of one process in training, GiB", caption))
    if remedies:
        print(*remedies, sep="\n")


class _Job:
    """A job whose micro-batches can be made of any size."""

    def __init__(self, config: TrainConfig, objective: "Objective", values: "PreTrainedConfig", processes: int):
        from prefopt.training.memory import TracedStep

        self.config, self.objective, self.values, self.processes = config, objective, values, processes
        self.traced = TracedStep(config, objective, values, processes)
        self.share = max(1, config.batch_size // processes)
        self.size = objective.micro_batch_size if objective.scope == "micro_batch" else None
        prompt, completion = config.max_prompt_tokens, config.max_completion_tokens
        counted = rows(config.dataset)
        means = counted[1] if counted else (prompt, completion, completion)
        if len(means) == 1:  # a chat
            means = (1.0, means[0])
        self.mean = _pair(min(means[0], prompt), *(min(mean, completion) for mean in means[1:]))
        positions = getattr(values.get_text_config(), "max_position_embeddings", None) or prompt + completion
        prompt = min(prompt, max(1, positions - completion))
        self.longest = _pair(prompt, *[min(completion, positions - prompt)] * (len(means) - 1))

    def fit(self, memory_gib: float | None) -> Fit:
        tokens = self.config.micro_batch_tokens
        memory, longest = self.memory(tokens), self.tokens(self.longest)
        if memory_gib is None:
            return Fit(memory, longest, None, {})

        def fits(step: "StepMemory") -> bool:
            return step.total <= USABLE * memory_gib * 2**30

        most = min(MOST_TOKENS, self.share * max(longest, self.tokens(self.mean)))
        if self.size:  # its micro-batches are what they are
            return (
                Fit(memory, longest, tokens, {}) if fits(memory) else Fit(memory, longest, None, dict(self.remedies()))
            )
        if fits(memory):
            while tokens < most and fits(self.memory(2 * tokens)):
                tokens *= 2
            return Fit(memory, longest, tokens, {})
        while tokens > min(longest, self.tokens(self.mean)):
            tokens //= 2
            if fits(self.memory(tokens)):
                return Fit(memory, longest, tokens, {})
        return Fit(memory, longest, None, dict(self.remedies()))

    def memory(self, tokens: int) -> "StepMemory":
        """That of the largest micro-batch with micro_batch_tokens=`tokens`: a full one, or the longest row."""
        if self.size:
            return self.traced.memory([self.mean] * self.size)
        each = self.tokens(self.mean)
        count = max(1, min(tokens // each, self.share))
        pair = _stretched(self.mean, tokens / (count * each)) if count < self.share else self.mean
        steps = [self.traced.memory([pair] * count)]
        if self.tokens(self.longest) > tokens:
            steps.append(self.traced.memory([self.longest]))
        return max(steps, key=lambda step: step.total)

    def tokens(self, pair: "TokenizedPair") -> int:
        """The tokens of a pair's rows, padding included."""
        state = self.traced.state
        return state.layout.collate([pair], self.objective.completions).input_ids.numel()

    def remedies(self) -> Iterator[tuple[str, int]]:
        tokens = min(self.tokens(self.longest), self.config.micro_batch_tokens)
        for text, changes in REMEDIES.items():
            if all(getattr(self.config, key) == value for key, value in changes.items()):
                continue
            if self.config.peft.target_modules and "peft" in changes:
                continue
            with contextlib.suppress(UserError):  # layers of other names
                other = _Job(replace(self.config, **changes), self.objective, self.values, self.processes)
                yield text, other.memory(tokens).total


def _pair(prompt: float, chosen: float, rejected: float = 0.0, *others: float) -> "TokenizedPair":
    """A pair, or with `others` a group, of texts of these tokens."""
    from prefopt.data.tokenize import TokenizedPair

    first, second, third, *more = ([0] * max(1, round(n)) for n in (prompt, chosen, rejected, *others))
    of_chosen, of_rejected = ([1.0] * len(text) for text in (second, third))
    rewards = [0.5] * len(more)
    return TokenizedPair(
        "", first, second, third, 0.5, 0.5, 1.0, of_chosen, of_rejected, others=more or None, other_rewards=rewards
    )


def _stretched(pair: "TokenizedPair", factor: float) -> "TokenizedPair":
    if factor <= 1:
        return pair
    return _pair(*(factor * len(part) for part in (pair.prompt, pair.chosen, pair.rejected, *(pair.others or []))))
