"""The configuration nodes that several programs share, and what their fields may hold."""

import dataclasses
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

ADAPTER_CONFIG = "adapter_config.json"
Rules = Iterator[tuple[bool, str]]
"""(whether a rule holds, the message if it does not), the message led by the field's name."""


class Node:
    """A dataclass of configuration values that refuses bad ones: raises ValueError with a line for each broken rule.

    A rule looks at the fields of one node. What ties several nodes together is checked by the program's `check`.
    """

    def rules(self) -> Rules:
        raise NotImplementedError

    def __post_init__(self) -> None:
        # OmegaConf makes instances of the defaults to learn the types; their values are still to come.
        if any(getattr(self, f.name) == MISSING for f in dataclasses.fields(self)):  # type: ignore[arg-type]
            return
        if problems := [message for holds, message in self.rules() if not holds]:
            raise ValueError("\n".join(problems))


@dataclass
class ModelConfig(Node):
    """A model: what is at `path`, with the adapter in the folder `adapter` merged into it.

    A `path` that is the folder of an adapter, such as a LoRA run's policy, is taken for the base that the adapter
    names, and the adapter.
    """

    name: str = MISSING
    path: str = MISSING
    revision: str | None = None
    adapter: str | None = None
    tokenizer: str | None = None
    eos_token: str | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    system_message: str = "merge"
    date: str = "2024-07-26"
    resize_embeddings: bool = False
    router_aux_loss_coef: float = 0.0

    def rules(self) -> Rules:
        yield (
            self.system_message in ("merge", "drop", "fail"),
            f"system_message must be merge, drop or fail, is {self.system_message!r}",
        )
        yield self.router_aux_loss_coef >= 0, "router_aux_loss_coef must not be negative (0: none)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adapter is not None or self.path == MISSING or not is_adapter(self.path):
            return
        folder = Path(self.path).expanduser()
        try:
            values = json.loads((folder / ADAPTER_CONFIG).read_text())
            base, revision = values["base_model_name_or_path"], values.get("revision")
        except (ValueError, TypeError, KeyError, AttributeError):
            base = revision = None
        if not (base and isinstance(base, str) and isinstance(revision, str | None)):
            raise ValueError(f"path={folder} is an adapter that names no base: give path=BASE and adapter={folder}")
        self.path, self.revision, self.adapter = base, revision, str(folder)
        if self.tokenizer is None and (folder / "tokenizer_config.json").is_file():
            self.tokenizer = self.adapter

    @property
    def place(self) -> str:
        """What tells it from other models of the same base: the adapter's folder, or else its path."""
        return self.adapter or self.path

    def exported(self, path: str) -> "ModelConfig":
        """The model in `path` that a run of this model has exported, whole or as an adapter of it. Its tokenizer lies
        beside it, with the template and the eos token that the run had."""
        alone = is_adapter(path)
        return dataclasses.replace(
            self,
            path=self.path if alone else path,
            adapter=path if alone else None,
            revision=self.revision if alone else None,
            tokenizer=path if alone else None,
            eos_token=None,
            chat_template=None,
            chat_template_kwargs={},
            resize_embeddings=False,
        )


def is_adapter(path: str) -> bool:
    """Whether `path` is a folder with an adapter, and no model beside it."""
    folder = os.path.expanduser(path)  # noqa: PTH111  # what cannot be a path is none
    if not os.path.isfile(f"{folder}/{ADAPTER_CONFIG}"):  # noqa: PTH113
        return False
    return not (Path(folder) / "config.json").is_file() and not any(Path(folder).glob("*.gguf"))


@dataclass
class PoliciesConfig:
    """What is done about a defect of a row: keep, drop or fail. Every one is counted."""

    wrong_roles: str = "fail"  # turns that do not alternate, or do not end with the assistant (cannot be kept)
    sides_part_early: str = "drop"  # two conversations that differ before their last turn (cannot be kept)
    multi_turn_completion: str = "drop"  # a completion of several messages; the loss covers one (cannot be kept)
    missing_text: str = "drop"  # a null prompt or completion, or an empty prompt (cannot be kept)
    not_text: str = "fail"  # a number, an image... where text belongs (cannot be kept)
    no_preference: str = "drop"  # no two different rewards, or votes without a majority (cannot be kept)
    unpaired_label: str = "drop"  # a completion whose prompt has none of the other label for it (cannot be kept)
    bad_reward: str = "drop"  # a reward that is no number, such as N/A or NaN; keep: as if the row had none
    empty_completion: str = "drop"
    identical: str = "drop"  # chosen is rejected
    tied_rewards: str = "keep"  # the rewards of the two sides are equal
    contradicting_rewards: str = "drop"  # the rejected side has the higher reward
    duplicate_prompt: str = "keep"  # the prompt came before in this split
    prompt_in_heldout: str = "drop"  # a training prompt that is also held out
    prompt_too_long: str = "drop"  # drop, fail, or cut: it loses its beginning
    template_in_text: str = "drop"  # the text holds special tokens, or a turn's markup, of the chat template
    rewritten_by_template: str = "fail"  # the template leaves out a part of what the row says (cannot be kept)
    identical_after_truncation: str = "drop"


@dataclass
class DatasetConfig:
    """A source of rows (train, heldout and how to read them), or a mixture of several (`sources`).

    Where no source has `heldout`, `heldout_share` of the training prompts is held out; of a mixture, its own counts.
    """

    name: str = MISSING
    train: str | None = None
    heldout: str | None = None
    train_split: str = "train"
    heldout_split: str = "heldout"
    revision: str | None = None
    format: Any = None
    columns: dict[str, str] = field(default_factory=dict)
    reward_scale: list[float] | None = None
    weight: float | None = None
    count: int | None = None
    sources: dict[str, Any] = field(default_factory=dict)
    policies: PoliciesConfig = field(default_factory=PoliciesConfig)
    oracle: Any = None
    heldout_share: float = 0.1


@dataclass
class OptimizerConfig(Node):
    lr: float | None = MISSING
    betas: list[float] = MISSING
    eps: float = MISSING
    weight_decay: float = MISSING
    max_grad_norm: float = MISSING
    eight_bit: bool = False

    @property
    def peak(self) -> float:
        """`lr`, once the objective has decided what is null (`TrainConfig.fill`)."""
        assert self.lr is not None
        return self.lr

    def rules(self) -> Rules:
        yield self.lr is None or self.lr > 0, f"lr must be positive, is {self.lr}"
        in_range = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        yield in_range, f"betas must be two numbers in [0, 1), is {self.betas}"
        yield self.eps > 0, f"eps must be positive, is {self.eps}"
        yield self.weight_decay >= 0, "weight_decay must not be negative"
        yield self.max_grad_norm >= 0, "max_grad_norm must not be negative (0: no clipping)"


@dataclass
class PeftConfig(Node):
    target_modules: list[str] = MISSING
    r: int = MISSING
    alpha: int = MISSING
    dropout: float = MISSING
    quantize: bool = MISSING

    def rules(self) -> Rules:
        yield self.r >= 1, f"r must be at least 1, is {self.r}"
        yield self.alpha >= 1, f"alpha must be at least 1, is {self.alpha}"
        yield 0 <= self.dropout < 1, f"dropout must be in [0, 1), is {self.dropout}"
        yield (
            not self.quantize or bool(self.target_modules),
            "quantize freezes the weights in 4 bits, and there is no adapter to train: add peft=lora_attention or "
            "peft=lora_attention_mlp",
        )


@dataclass
class MultiReferenceConfig(Node):
    """References beside the first one, and how they become a single one (`prefopt.models.multi_reference`)."""

    models: list[str] = field(default_factory=list)
    mean: str = "harmonic"
    weights: list[float] | None = None
    clip: float | None = 0.1

    def rules(self) -> Rules:
        yield self.mean in ("harmonic", "geometric"), f"mean must be harmonic or geometric, is {self.mean!r}"
        yield self.clip is None or 0 <= self.clip < 1, f"clip must be in [0, 1), or null for none, is {self.clip}"
        if self.weights is not None:
            n = len(self.models) + 1
            yield len(self.weights) == n, f"weights must be {n}, of the first reference and of each in models"
            yield abs(sum(self.weights) - 1) < 1e-6, f"weights must add up to 1, add up to {sum(self.weights):g}"
            positive = all(weight >= 0 for weight in self.weights)
            yield self.mean == "geometric" or positive, "weights must not be negative where the mean is harmonic"


@dataclass
class ReferenceSyncConfig(Node):
    """How a resident reference follows the policy (`prefopt.models.reference.Following`)."""

    every: int | None = None
    alpha: float = 1.0

    def rules(self) -> Rules:
        yield (
            self.every is None or self.every >= 1,
            f"every must be at least 1 step, or null for never, is {self.every}",
        )
        yield 0 < self.alpha <= 1, f"alpha must be above 0 and at most 1, is {self.alpha}"


@dataclass
class EngineConfig(Node):
    name: str = MISSING
    offload_optimizer: bool = MISSING
    hang_s: float = MISSING

    def rules(self) -> Rules:
        yield self.name in ("single", "zero2", "fsdp"), f"name must be single, zero2 or fsdp, is {self.name!r}"
        yield self.hang_s > 0, f"hang_s must be positive, is {self.hang_s:g}"
        yield not self.offload_optimizer or self.name == "zero2", "offload_optimizer: only engine=zero2 can"


@dataclass
class WandbConfig(Node):
    project: str = MISSING
    mode: str = MISSING
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)

    def rules(self) -> Rules:
        yield self.mode in ("offline", "online"), f"mode must be offline or online, is {self.mode!r}"
        yield len(self.group or "") <= 128, "group must have at most 128 characters, for wandb"
        yield (
            all(1 <= len(tag) <= 64 for tag in self.tags),
            "tags must have 1 to 64 characters each, as wandb takes them",
        )


@dataclass
class LoggerConfig:
    progress: bool = MISSING
    curves: bool = True
    csv: bool = False
    tensorboard: bool = False
    wandb: WandbConfig | None = None


@dataclass
class SamplingConfig(Node):
    temperature: float = MISSING
    top_p: float = MISSING
    max_new_tokens: int = MISSING
    batch_size: int = MISSING

    def rules(self) -> Rules:
        yield self.temperature >= 0, f"temperature must not be negative, is {self.temperature}"
        yield 0 < self.top_p <= 1, f"top_p must be above 0 and at most 1, is {self.top_p}"
        yield self.max_new_tokens >= 1, "max_new_tokens must be at least 1"
        yield self.batch_size >= 1, "batch_size must be at least 1"


@dataclass
class ServerConfig(Node):
    """Of backend=server: how a server of the model is started, or where it runs already."""

    command: str | None = MISSING
    url: str = MISSING
    timeout: float = MISSING

    def rules(self) -> Rules:
        yield self.timeout > 0, f"timeout must be positive, is {self.timeout:g}"
        if self.command is None:
            yield "{port}" not in self.url, "url must be that of a server that runs: url=http://HOST:PORT/v1"
        else:
            yield (
                "{model}" in self.command,
                "command must name {model}, the folder with the model that is to be served. For a server that runs "
                "already give command=null, and its url",
            )
            yield (
                ("{port}" in self.command) == ("{port}" in self.url),
                "command and url must both name {port}, or neither of them",
            )


@dataclass
class EvaluationSamplingConfig(SamplingConfig):
    """Of the samples of a training run's evaluations. `prompts`: how many held-out prompts get one; None: all."""

    prompts: int | None = MISSING

    def rules(self) -> Rules:
        yield from super().rules()
        yield self.prompts is None or self.prompts >= 0, "prompts must not be negative (0: none), or null for all"
