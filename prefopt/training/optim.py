"""The optimizer, and schedules as pure functions of the optimizer step."""

import importlib.util
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prefopt.config.schema import OptimizerConfig
from prefopt.errors import UserError
from prefopt.objectives.base import require


class Schedule(ABC):
    """A learning-rate schedule: a frozen dataclass that a YAML names with `_target_`."""

    @abstractmethod
    def __call__(self, step: int, steps: int) -> float:
        """The learning rate at optimizer step `step` (0 .. steps - 1), as a share of the peak."""


@dataclass(frozen=True)
class WarmedUp(Schedule):
    """Linear warm-up to the peak, then what `after_warmup` says.

    `warmup` below 1 is a share of all steps, from 1 on a number of steps. With w warm-up steps, step 0 has 1 / w of the
    peak, and step w - 1 reaches it.
    """

    warmup: float

    def __post_init__(self) -> None:
        whole = self.warmup >= 1 and self.warmup == int(self.warmup)
        require(
            0 <= self.warmup < 1 or whole,
            f"warmup must be a share of the steps in [0, 1), or a number of steps, got {self.warmup}",
        )

    def __call__(self, step: int, steps: int) -> float:
        warmup = round(self.warmup * steps) if self.warmup < 1 else min(int(self.warmup), steps)
        if step < warmup:
            return (step + 1) / warmup
        return self.after_warmup((step - warmup) / max(1, steps - warmup))

    @abstractmethod
    def after_warmup(self, progress: float) -> float:
        """The share of the peak after the share `progress`, in [0, 1), of the steps behind the warm-up."""


@dataclass(frozen=True)
class Constant(WarmedUp):
    """The peak, after the warm-up."""

    def after_warmup(self, progress: float) -> float:
        return 1.0


@dataclass(frozen=True)
class Decaying(WarmedUp):
    """From the peak down to `final`, a share of it."""

    final: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.final <= 1, f"final must be a share of the peak in [0, 1], got {self.final}")


@dataclass(frozen=True)
class Cosine(Decaying):
    """Half a cosine down to `final`, after the warm-up."""

    def after_warmup(self, progress: float) -> float:
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Linear(Decaying):
    """A straight line down to `final`, after the warm-up."""

    def after_warmup(self, progress: float) -> float:
        return self.final + (1 - self.final) * (1 - progress)


def check_optimizer(config: OptimizerConfig) -> None:
    """Raise UserError where the optimizer's package is missing."""
    if config.eight_bit and not importlib.util.find_spec("bitsandbytes"):
        raise UserError("optimizer=adamw_8bit needs the package bitsandbytes: pip install -e '.[bitsandbytes]'")


def adamw(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters; matrices decay, vectors (biases, norms) do not.

    Raises TypeError for trainable parameters that are not float32: updates below their rounding would be lost.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for name, p in trainable:
        if p.dtype != torch.float32:
            raise TypeError(f"{name} is {p.dtype}; master weights must be float32")
    groups: list[dict[str, Any]] = [
        {"params": [p for _, p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for _, p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = (config.betas[0], config.betas[1])
    if config.eight_bit:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, lr=config.peak, betas=betas, eps=config.eps)
    return torch.optim.AdamW(groups, lr=config.peak, betas=betas, eps=config.eps, fused=True)
