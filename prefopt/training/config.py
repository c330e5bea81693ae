"""The fields of a training run, and the rules that tie them together."""

import math
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from prefopt.config.hardware import hardware_problems, micro_batch_tokens, resolve_hardware
from prefopt.config.parse import file_name_problems
from prefopt.config.schema import (
    DatasetConfig,
    EngineConfig,
    LoggerConfig,
    ModelConfig,
    OptimizerConfig,
    PeftConfig,
    SamplingConfig,
)
from prefopt.errors import UserError
from prefopt.generation.config import sampler_problems, sampling_problems

CHOICES = {
    "layout": ("packed", "prefix_shared", "padded"),
    "logits": ("tiled", "dense"),
    "reference": ("cached", "resident", "adapter_off"),
    "nonfinite": ("stop", "skip"),
}


@dataclass
class TrainConfig:
    """What `python -m prefopt.train` reads; conf/train_base.yaml holds the defaults and says what each key means."""

    model: ModelConfig = field(default_factory=ModelConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    objective: Any = MISSING
    engine: EngineConfig = field(default_factory=EngineConfig)
    peft: PeftConfig = field(default_factory=PeftConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: Any = MISSING
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    launcher: Any = MISSING
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    steps: int | None = None
    epochs: float | None = None
    batch_size: int = MISSING
    micro_batch_tokens: int = MISSING
    layout: str = MISSING
    logits: str = MISSING
    reference: str = MISSING
    compile: bool = MISSING
    gradient_checkpointing: bool = MISSING
    eval_every: int = MISSING
    save_every: int = MISSING
    exports: int = MISSING
    max_prompt_tokens: int = MISSING
    max_completion_tokens: int = MISSING
    heldout_pairs: int | None = None
    reference_model: str | None = None
    patience: int | None = None
    squeeze_alarm: float | None = None
    nonfinite: str = MISSING
    seed: int = MISSING
    precision: str = MISSING
    device: str = MISSING
    runs_dir: str = MISSING

    @property
    def total_steps(self) -> int:
        """`steps`, once the number of pairs has turned `epochs` into it (`count_steps`)."""
        assert self.steps is not None
        return self.steps

    def count_steps(self, pairs: int) -> None:
        """Where epochs are given, the steps that take them over so many pairs."""
        if self.epochs is not None:
            self.steps = math.ceil(self.epochs * pairs / self.batch_size)


@dataclass
class OnlineConfig(TrainConfig):
    """What `python -m prefopt.online` reads (conf/online.yaml): a training run, and where its stages get their rows."""

    scorer: Any = MISSING
    prompts: str = MISSING
    prompts_split: str | None = None
    stages: int = MISSING
    samples_per_prompt: int = MISSING
    stage_sampling: SamplingConfig = field(default_factory=SamplingConfig)
    backend: str = MISSING
    stage_reference: str = MISSING


def check(config: TrainConfig) -> None:
    """Cross-field checks. Raises UserError that lists every problem found."""
    problems = file_name_problems(model__name=config.model.name, dataset__name=config.dataset.name)
    problems += [
        f"{key} must be at least 1, is {getattr(config, key)}"
        for key in ("batch_size", "eval_every", "save_every")
        if getattr(config, key) < 1
    ]
    rules: list[tuple[bool, str]] = [
        (
            config.heldout_pairs is None or config.heldout_pairs >= 1,
            "heldout_pairs must be at least 1, or null for all",
        ),
        (
            (config.steps is None) != (config.epochs is None),
            "give steps or epochs, and null for the other one (steps=null epochs=3)",
        ),
        (config.steps is None or config.steps >= 1, f"steps must be at least 1, is {config.steps}"),
        (config.epochs is None or config.epochs > 0, f"epochs must be positive, is {config.epochs}"),
        (
            config.exports >= 1,
            "exports must be at least 1: the last policy",
        ),
        (
            config.patience is None or config.patience >= 1,
            "patience must be at least 1 evaluation, or null for none",
        ),
        (
            config.reference_model is None or config.reference != "adapter_off",
            "reference=adapter_off is the policy without its adapter, and reference_model is another model: leave one "
            "of them out",
        ),
        (config.micro_batch_tokens >= 0, "micro_batch_tokens must not be negative (0: what suits the device)"),
        (config.max_prompt_tokens >= 1, "max_prompt_tokens must be at least 1"),
        (config.max_completion_tokens >= 1, "max_completion_tokens must be at least 1"),
        (config.optimizer.lr > 0, f"optimizer.lr must be positive, is {config.optimizer.lr}"),
        (
            len(config.optimizer.betas) == 2 and all(0 <= beta < 1 for beta in config.optimizer.betas),
            f"optimizer.betas must be two numbers in [0, 1), is {config.optimizer.betas}",
        ),
        (config.optimizer.eps > 0, f"optimizer.eps must be positive, is {config.optimizer.eps}"),
        (config.optimizer.max_grad_norm >= 0, "optimizer.max_grad_norm must not be negative (0: no clipping)"),
        (config.optimizer.weight_decay >= 0, "optimizer.weight_decay must not be negative"),
        (0 <= config.seed < 2**32, f"seed must be from 0 to {2**32 - 1}, is {config.seed}"),
        (
            config.reference != "adapter_off" or bool(config.peft.target_modules),
            "reference=adapter_off is the policy without its adapter, and there is none: add peft=lora_attention or "
            "peft=lora_attention_mlp, or leave reference=cached",
        ),
        (config.engine.name in ("single", "zero2"), f"engine.name must be single or zero2, is {config.engine.name!r}"),
        (config.engine.hang_s > 0, f"engine.hang_s must be positive, is {config.engine.hang_s:g}"),
        (
            not config.engine.offload_optimizer or config.engine.name == "zero2",
            "engine.offload_optimizer: only engine=zero2 can",
        ),
        (
            config.engine.name == "single" or not config.optimizer.eight_bit,
            "optimizer=adamw_8bit and engine=zero2 do not go together; use optimizer=adamw",
        ),
        (
            not config.peft.quantize or bool(config.peft.target_modules),
            "peft.quantize freezes the weights in 4 bits, and there is no adapter to train: add peft=lora_attention or "
            "peft=lora_attention_mlp",
        ),
        (
            not config.peft.quantize or config.peft.path is None,
            "peft.quantize and peft.path do not go together: merge the adapter into a checkpoint first (the policy/ of "
            "the run that made it is one)",
        ),
        (
            not config.peft.quantize or config.reference != "resident",
            "peft.quantize: use reference=cached or adapter_off, which need no second copy",
        ),
        (
            not config.peft.quantize or config.engine.name == "single",
            "peft.quantize and engine=zero2 do not go together",
        ),
        (config.peft.r >= 1, f"peft.r must be at least 1, is {config.peft.r}"),
        (config.peft.alpha >= 1, f"peft.alpha must be at least 1, is {config.peft.alpha}"),
        (0 <= config.peft.dropout < 1, f"peft.dropout must be in [0, 1), is {config.peft.dropout}"),
        (
            config.squeeze_alarm is None or config.squeeze_alarm > 0,
            f"squeeze_alarm must be positive, or null for none, is {config.squeeze_alarm}",
        ),
    ]
    problems += [message for holds, message in rules if not holds]
    for key, choices in CHOICES.items():
        if getattr(config, key) not in choices:
            problems.append(f"{key} must be {' or '.join(choices)}, is {getattr(config, key)!r}")
    problems += sampling_problems(config.sampling)
    if config.logger.wandb and config.logger.wandb.mode not in ("offline", "online"):
        problems.append(f"logger.wandb.mode must be offline or online, is {config.logger.wandb.mode!r}")
    problems += hardware_problems(config)
    if problems:
        raise UserError("\n".join(problems))


def check_online(config: OnlineConfig) -> None:
    """`check`, and what a sequence of stages needs besides."""
    problems = [message.replace("sampling.", "stage_sampling.") for message in sampling_problems(config.stage_sampling)]
    problems += sampler_problems(config.samples_per_prompt, config.backend)
    if config.stages < 1:
        problems.append(f"stages must be at least 1, is {config.stages}")
    if config.samples_per_prompt == 1:
        problems.append("samples_per_prompt must be at least 2: a pair is the best and the worst of them")
    if config.stage_reference not in ("initial", "previous"):
        problems.append(f"stage_reference must be initial or previous, is {config.stage_reference!r}")
    if config.stage_reference == "initial" and config.reference == "adapter_off" and config.stages > 1:
        problems.append("reference=adapter_off is the policy of the stage before: set stage_reference=previous")
    if config.dataset.train or config.dataset.sources:
        problems.append("dataset.train: a stage makes its own rows; leave it out, and name the prompts by prompts=FILE")
    try:
        check(config)
    except UserError as error:
        problems += str(error).splitlines()
    if problems:
        raise UserError("\n".join(problems))


def resolve(config: TrainConfig) -> None:
    """`resolve_hardware`, and micro_batch_tokens=0 by what suits the device."""
    resolve_hardware(config)
    config.micro_batch_tokens = config.micro_batch_tokens or micro_batch_tokens(config.device)
