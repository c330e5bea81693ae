"""The fields of a training run, and the rules that tie them together."""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from prefopt.config.hardware import hardware_problems, micro_batch_tokens, resolve_hardware
from prefopt.config.parse import file_name_problems
from prefopt.config.schema import (
    DatasetConfig,
    EngineConfig,
    EvaluationSamplingConfig,
    LoggerConfig,
    ModelConfig,
    MultiReferenceConfig,
    Node,
    OptimizerConfig,
    PeftConfig,
    ReferenceSyncConfig,
    Rules,
    SamplingConfig,
    ServerConfig,
)
from prefopt.errors import UserError
from prefopt.generation.config import sampler_problems

if TYPE_CHECKING:
    from prefopt.objectives.base import Objective

AUTO = "auto"  # of `resume`: from the longest shorter run there is
EVALUATIONS = 10  # of a run with eval_every=0, beside that before its first step
CHOICES = {
    "layout": ("packed", "prefix_shared", "padded"),
    "logits": ("tiled", "dense"),
    "reference": ("cached", "resident", "adapter_off"),
    "nonfinite": ("stop", "skip"),
    "export_dtype": ("float32", "bfloat16"),
}


@dataclass
class TrainConfig(Node):
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
    sampling: EvaluationSamplingConfig = field(default_factory=EvaluationSamplingConfig)
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
    keep_checkpoint: bool = MISSING
    exports: int = MISSING
    export_dtype: str = MISSING
    merge_adapter: bool = MISSING
    push_to_hub: str | None = None
    max_prompt_tokens: int = MISSING
    max_completion_tokens: int = MISSING
    heldout_pairs: int | None = None
    reference_model: str | None = None
    multi_reference: MultiReferenceConfig = field(default_factory=MultiReferenceConfig)
    reference_sync: ReferenceSyncConfig = field(default_factory=ReferenceSyncConfig)
    patience: int | None = None
    squeeze_alarm: float | None = None
    nonfinite: str = MISSING
    seed: int = MISSING
    precision: str = MISSING
    device: str = MISSING
    runs_dir: str = MISSING
    resume: str | None = None

    def rules(self) -> Rules:
        yield self.batch_size >= 1, f"batch_size must be at least 1, is {self.batch_size}"
        yield self.eval_every >= 0, "eval_every must not be negative (0: ten times in the run)"
        yield self.save_every >= 0, "save_every must not be negative (0: as often as it is evaluated)"
        yield self.heldout_pairs is None or self.heldout_pairs >= 1, "heldout_pairs must be at least 1, or null for all"
        yield self.steps is None or self.steps >= 1, f"steps must be at least 1, is {self.steps}"
        yield self.epochs is None or self.epochs > 0, f"epochs must be positive, is {self.epochs}"
        yield self.exports >= 1, "exports must be at least 1: the last policy"
        yield self.patience is None or self.patience >= 1, "patience must be at least 1 evaluation, or null for none"
        yield self.micro_batch_tokens >= 0, "micro_batch_tokens must not be negative (0: what suits the device)"
        yield self.max_prompt_tokens >= 1, "max_prompt_tokens must be at least 1"
        yield self.max_completion_tokens >= 1, "max_completion_tokens must be at least 1"
        yield 0 <= self.seed < 2**32, f"seed must be from 0 to {2**32 - 1}, is {self.seed}"
        yield (
            self.squeeze_alarm is None or self.squeeze_alarm > 0,
            f"squeeze_alarm must be positive, or null for none, is {self.squeeze_alarm}",
        )
        for key, choices in CHOICES.items():
            value = getattr(self, key)
            yield value in choices, f"{key} must be {' or '.join(choices)}, is {value!r}"

    @property
    def total_steps(self) -> int:
        """`steps`; where `epochs` count them, only after `count_steps`."""
        assert self.steps is not None
        return self.steps

    def count_steps(self, pairs: int) -> None:
        """Where `epochs` are given, set `steps` to that many passes over `pairs` pairs. Then `eval_every` and
        `save_every`, where they are 0."""
        if self.epochs is not None:
            self.steps = math.ceil(self.epochs * pairs / self.batch_size)
        self.eval_every = self.eval_every or math.ceil(self.total_steps / EVALUATIONS)
        self.save_every = self.save_every or self.eval_every

    def export_steps(self, steps: int) -> list[int]:
        """The steps of a run of `steps` after which the policy is exported: `exports` - 1 of them, evenly spaced. The
        final export is extra."""
        return sorted({round(k * steps / self.exports) for k in range(1, self.exports)})

    def fill(self, objective: "Objective") -> None:
        """Set what is null and what `objective` decides: the learning rate, and one epoch where no length is given. So
        a run's identity and its record hold the numbers."""
        if self.steps is None and self.epochs is None:
            self.epochs = 1.0
        if self.optimizer.lr is None:
            self.optimizer.lr = objective.learning_rates[bool(self.peft.target_modules)]


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
    server: ServerConfig = field(default_factory=ServerConfig)
    stage_reference: str = MISSING
    stage_momentum: float = MISSING

    def rules(self) -> Rules:
        yield from super().rules()
        yield self.stages >= 1, f"stages must be at least 1, is {self.stages}"
        yield (
            self.samples_per_prompt >= 2,
            "samples_per_prompt must be at least 2: a pair is the best and the worst of them",
        )
        yield (
            self.stage_reference in ("initial", "previous", "accelerated"),
            f"stage_reference must be initial, previous or accelerated, is {self.stage_reference!r}",
        )
        yield 0 < self.stage_momentum < 1, f"stage_momentum must be between 0 and 1, is {self.stage_momentum}"


def check(config: TrainConfig) -> None:
    """Check what ties nodes together, and the hardware. `parse` has checked each node by itself.

    Raises UserError that lists every problem.
    """
    if problems := train_problems(config):
        raise UserError("\n".join(problems))


def check_online(config: OnlineConfig) -> None:
    """`check`, and the rules of a run in stages. Raises UserError that lists every problem."""
    problems = sampler_problems(config.samples_per_prompt, config.backend)
    if config.stage_reference == "initial" and config.reference == "adapter_off" and config.stages > 1:
        problems.append("reference=adapter_off is the policy of the stage before: set stage_reference=previous")
    if config.stage_reference == "accelerated":
        taken = {"reference_model": config.reference_model, "multi_reference.models": config.multi_reference.models}
        problems += [
            f"{key}: stage_reference=accelerated makes the references of a stage; leave it out"
            for key, value in taken.items()
            if value
        ]
        if config.reference != "cached":
            problems.append(
                f"stage_reference=accelerated scores two references, once: reference={config.reference} "
                "scores every batch; leave reference=cached"
            )
    if config.stage_reference != "previous" and config.reference_model is None and config.stages > 1:
        made_here = {"model.adapter": config.model.adapter, "model.resize_embeddings": config.model.resize_embeddings}
        problems += [
            f"{key}: the initial policy is a reference of later stages, and is in no folder from which these could "
            "load it. Start from one (the policy/ of a run with merge_adapter=true), or set "
            "stage_reference=previous"
            for key, value in made_here.items()
            if value
        ]
    if config.dataset.train or config.dataset.sources:
        problems.append("dataset.train: a stage makes its own rows; leave it out, and name the prompts by prompts=FILE")
    if config.dataset.heldout_share:
        problems.append(
            f"dataset.heldout_share={config.dataset.heldout_share:g}: every stage would hold out prompts of its own, "
            "and their evaluations would not compare; set it to 0, and give dataset.heldout=FILE"
        )
    if config.resume:
        problems.append(f"resume={config.resume}: only prefopt.train goes on from another run; leave it out")
    problems += train_problems(config)
    if problems:
        raise UserError("\n".join(problems))


def train_problems(config: TrainConfig) -> list[str]:
    """Every problem with a config whose nodes are right by themselves."""
    adapter, quantize = bool(config.peft.target_modules), config.peft.quantize
    # Names are checked here and not in their nodes: a ModelConfig is also made of a hub name, which has a slash.
    problems = file_name_problems({"model.name": config.model.name, "dataset.name": config.dataset.name})
    if config.steps is not None and config.epochs is not None:  # not a rule of the node: `count_steps` sets both
        problems.append(
            f"steps={config.steps} and epochs={config.epochs:g} are given: leave one of them out (steps=null or "
            "epochs=null where a sweep's file gives it)"
        )
    if config.reference == "adapter_off" and config.reference_model is not None:
        problems.append(
            "reference=adapter_off is the policy without its adapter, and reference_model is another model: leave one "
            "of them out"
        )
    if config.reference_sync.every:
        if config.reference != "resident":
            problems.append(
                f"reference_sync moves the reference, and reference={config.reference} is the initial policy for the "
                "whole run: add reference=resident"
            )
        if adapter:
            problems.append(
                "reference_sync moves the reference's weights towards the policy's, and below an adapter these do not "
                "change: set peft=none"
            )
        if config.engine.name != "single":
            problems.append(
                "reference_sync reads the policy's weights, and with several processes none has them as they are "
                "trained: leave engine=single"
            )
        if config.reference_model:
            problems.append("reference_sync and reference_model do not go together: the reference begins as the policy")
    if config.multi_reference.models and config.reference != "cached":
        problems.append(
            f"multi_reference.models are scored once, one after the other, and reference={config.reference} scores "
            "every batch: leave reference=cached"
        )
    if config.reference == "adapter_off" and not adapter:
        problems.append(
            "reference=adapter_off is the policy without its adapter, and there is none: add peft=lora_attention or "
            "peft=lora_attention_mlp, or leave reference=cached"
        )
    if config.engine.name != "single":
        problems += engine_problems(config)
    if quantize and config.reference == "resident":
        problems.append("peft.quantize: use reference=cached or adapter_off, which need no second copy")
    if quantize and config.model.adapter:
        problems.append(
            "peft.quantize and model.adapter do not go together: merge the adapter into a model first (merge_adapter="
            "true in the run that trains it)"
        )
    return problems + hardware_problems(config)


def engine_problems(config: TrainConfig) -> list[str]:
    """What does not go with the engine for several processes."""
    engine, problems = f"engine={config.engine.name}", []
    if config.optimizer.eight_bit:
        problems.append(f"optimizer=adamw_8bit and {engine} do not go together; use optimizer=adamw")
    if config.peft.quantize:
        problems.append(
            f"peft.quantize and {engine} do not go together; without it the weights below the adapter are bfloat16"
        )
    if config.compile and config.engine.name == "fsdp":
        problems.append(f"compile and {engine} do not go together; leave it out")
    return problems


def resolve(config: TrainConfig) -> None:
    """Resolve device, precision and micro_batch_tokens=0 to their values on this machine. Changes `config`."""
    resolve_hardware(config)
    config.micro_batch_tokens = config.micro_batch_tokens or micro_batch_tokens(config.device)
