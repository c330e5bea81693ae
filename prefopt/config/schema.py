"""The configuration nodes that several programs share."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class ModelConfig:
    name: str = MISSING
    path: str = MISSING
    revision: str | None = None
    tokenizer: str | None = None


@dataclass
class PoliciesConfig:
    """What is done about a defect of a row: keep, drop or fail. Every one is counted."""

    wrong_roles: str = "fail"  # turns that do not alternate, or do not end with the assistant (cannot be kept)
    sides_part_early: str = "drop"  # two conversations that differ before their last turn (cannot be kept)
    no_preference: str = "drop"  # scored responses without two different rewards (cannot be kept)
    empty_completion: str = "drop"
    identical: str = "drop"  # chosen is rejected
    tied_rewards: str = "keep"  # the rewards of the two sides are equal
    duplicate_prompt: str = "keep"  # the prompt came before in this split
    prompt_in_heldout: str = "drop"  # a training prompt that is also held out
    prompt_too_long: str = "drop"  # drop, fail, or cut: it loses its beginning
    identical_after_truncation: str = "drop"


@dataclass
class DatasetConfig:
    """A source of rows (train, heldout and how to read them), or a mixture of several (`sources`)."""

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


@dataclass
class OptimizerConfig:
    lr: float = MISSING
    betas: list[float] = MISSING
    eps: float = MISSING
    weight_decay: float = MISSING
    max_grad_norm: float = MISSING
    eight_bit: bool = False


@dataclass
class PeftConfig:
    target_modules: list[str] = MISSING
    r: int = MISSING
    alpha: int = MISSING
    dropout: float = MISSING
    path: str | None = None
    quantize: bool = MISSING


@dataclass
class EngineConfig:
    name: str = MISSING
    offload_optimizer: bool = MISSING
    hang_s: float = MISSING


@dataclass
class WandbConfig:
    project: str = MISSING
    mode: str = MISSING


@dataclass
class LoggerConfig:
    progress: bool = MISSING
    wandb: WandbConfig | None = None


@dataclass
class SamplingConfig:
    temperature: float = MISSING
    top_p: float = MISSING
    max_new_tokens: int = MISSING
    batch_size: int = MISSING
