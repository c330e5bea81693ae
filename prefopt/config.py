"""The typed configuration: its schema, its checks, and how a `_target_` node becomes an object.

Everything a user can set is a field here or a field of the dataclass that a `_target_` names. What neither knows is
refused, also when it comes with Hydra's `+`.
"""

import dataclasses
import difflib
import importlib.util
import inspect
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path, PurePath
from typing import Any, Protocol, TypeVar, get_type_hints

from hydra.core.config_store import ConfigStore
from hydra.utils import get_class
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from prefopt import UserError
from prefopt.keys import key_in

T = TypeVar("T")

NO_KEYS = (
    "Configs and commands go into records and logs; a key stays in the environment, and a config names its variable "
    "(judge.key=OPENAI_API_KEY)."
)
PACKAGE = Path(str(files("prefopt")))
INSTALLED = (PACKAGE / "conf").is_dir()  # from a wheel, and not in a checkout
ROOT = PACKAGE if INSTALLED else PACKAGE.parent  # the folder that conf/ and sweeps/ are in

CHOICES = {
    "layout": ("packed", "prefix_shared", "padded"),
    "logits": ("tiled", "dense"),
    "reference": ("cached", "resident", "adapter_off"),
    "nonfinite": ("stop", "skip"),
}


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


@dataclass
class SampleConfig:
    """What `python -m prefopt.sample` reads (conf/sample.yaml)."""

    model: ModelConfig = field(default_factory=ModelConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    prompts: str = MISSING
    output: str = MISSING
    split: str | None = None
    samples_per_prompt: int = MISSING
    backend: str = MISSING
    seed: int = MISSING
    precision: str = MISSING
    device: str = MISSING


@dataclass
class ScoreConfig:
    """What `python -m prefopt.score` reads (conf/score.yaml)."""

    scorer: Any = MISSING
    input: str = MISSING
    output: str = MISSING
    split: str | None = None
    name: str = MISSING
    precision: str = MISSING
    device: str = MISSING


@dataclass
class HarnessConfig:
    """What `python -m prefopt.harness` reads (conf/harness.yaml)."""

    model: ModelConfig = field(default_factory=ModelConfig)
    launcher: Any = MISSING
    run: str | None = None
    tasks: Any = MISSING
    checkpoints: str = MISSING
    output: str | None = None
    num_fewshot: int | None = None
    chat_template: bool = MISSING
    limit: int | None = None
    batch_size: int = MISSING
    precision: str = MISSING
    device: str = MISSING


@dataclass
class AlpacaConfig:
    """What `python -m prefopt.alpaca` reads (conf/alpaca.yaml)."""

    judge: Any = MISSING
    launcher: Any = MISSING
    run: str = MISSING
    checkpoints: str = MISSING
    baseline: str = MISSING
    instructions: str | None = None
    split: str | None = None
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    backend: str = MISSING
    max_cost: float = MISSING
    seed: int = MISSING
    precision: str = MISSING
    device: str = MISSING


@dataclass
class ReportConfig:
    """What `python -m prefopt.report` reads (conf/report.yaml)."""

    runs_dir: str = MISSING
    output: str = MISSING
    columns: str | None = None
    published: str | None = None


@dataclass
class PapersConfig:
    """What `python -m prefopt.papers` reads (conf/papers.yaml)."""

    paper: str = MISSING
    runs_dir: str | None = None
    output: str = MISSING
    published: str = MISSING
    tasks: Any = None
    judge_name: str | None = None
    baseline_name: str | None = None


@dataclass
class RunsConfig:
    """What `python -m prefopt.runs` reads (conf/runs.yaml)."""

    runs_dir: str = MISSING
    name: str = MISSING
    status: list[str] = field(default_factory=list)
    watch: bool = MISSING
    best: str | None = None


@dataclass
class PrefetchConfig:
    """What `python -m prefopt.prefetch` reads (conf/prefetch.yaml)."""

    model: ModelConfig = field(default_factory=ModelConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    also: list[str] = field(default_factory=list)
    tasks: Any = None
    alpaca: bool = False
    check: bool = MISSING


@dataclass
class DataReportConfig:
    """What `python -m prefopt.data_report` reads (conf/data_report.yaml)."""

    model: ModelConfig = field(default_factory=ModelConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    max_prompt_tokens: int = MISSING
    max_completion_tokens: int = MISSING
    evaluation_prompts: list[str] = field(default_factory=list)
    output: str = MISSING


def register(*schemas: type) -> None:
    """Make schemas known to Hydra (TrainConfig as train_schema), and the groups and resolvers that YAMLs use."""
    store = ConfigStore.instance()
    for schema in schemas:
        name = re.sub(r"(?<!^)(?=[A-Z])", "_", schema.__name__.removesuffix("Config")).lower()
        store.store(name=f"{name}_schema", node=schema)
    # A wrapper (MaPPO) chooses its base among the pairwise objectives, which are those with a likelihood term:
    # objective/base=NAME is conf/objective/NAME.yaml.
    for file in sorted((ROOT / "conf" / "objective").glob("*.yaml")):
        node = OmegaConf.load(file)
        if "nll_weight" in node:
            store.store(group="objective/base", name=file.stem, node=node, package="objective.base")
    OmegaConf.register_new_resolver("basename", lambda path: PurePath(path or "").name, replace=True)


def parse(node: DictConfig, schema: type[T], prefix: str = "") -> T:
    """Resolve `node` into an instance of the dataclass `schema`. `prefix` leads the keys in messages.

    Raises UserError that names all unknown keys, or all numbers that are not finite, or the first key with a missing
    value, a wrong type, or a value that the dataclass refuses with ValueError (whose message begins with the field's
    name).
    """
    try:
        if unknown := _unknown_keys(node, schema, prefix):
            raise UserError("\n".join(unknown))
        merged = OmegaConf.merge(OmegaConf.structured(schema), node)
        missing = sorted(str(key) for key in OmegaConf.missing_keys(merged))
        if missing:
            raise UserError(
                f"no value for {', '.join(prefix + key for key in missing)}. Give it on the command line: "
                f"{prefix}{missing[0]}=VALUE"
            )
        OmegaConf.resolve(merged)
        for key, value in _texts(OmegaConf.to_container(merged), prefix):
            if found := key_in(value):
                raise UserError(f"{key} holds {found}. {NO_KEYS}")
        if problems := _not_finite(OmegaConf.to_container(merged), prefix):
            raise UserError("\n".join(problems))
        return OmegaConf.to_object(merged)  # type: ignore[return-value]  # to_object returns the structured type
    except OmegaConfBaseException as error:
        raise UserError(f"{prefix}{_describe(error)}") from None
    except ValueError as error:
        raise UserError(f"{prefix}{error}") from None


def build(node: Any, base: type[T], where: str) -> T:
    """Make the object that `node`, a mapping with `_target_` and the fields of that dataclass, describes.

    A field whose type is a class of ours (MaPPO's base) is built the same way from the mapping below it. Raises
    UserError, its message led by `where`, for a target that is not a dataclass derived from `base`, for unknown,
    missing or mistyped fields, and for values that the class refuses.
    """
    if not OmegaConf.is_dict(node) and not isinstance(node, dict):
        raise UserError(f"{where} must be a mapping with `_target_`, is {node!r}.")
    values = dict(node)
    target = values.pop("_target_", None)
    if not isinstance(target, str):
        raise UserError(f"{where} needs a `_target_` that names a Python class, such as package.module.Class.")
    try:
        cls = get_class(target)
    except Exception as error:  # whatever importing somebody's module raises
        raise UserError(f"{where}._target_: cannot import {target!r}: {error}") from None
    if not (dataclasses.is_dataclass(cls) and issubclass(cls, base)):
        raise UserError(f"{where}._target_: {target} must be a dataclass derived from {base.__name__}.")
    types, fields = get_type_hints(cls), dataclasses.fields(cls)  # type: ignore[arg-type]  # just checked
    parts = [f.name for f in fields if inspect.isabstract(types[f.name])]
    for name in parts:
        if name not in values:
            raise UserError(f"no value for {where}.{name}; it needs a mapping with `_target_`.")
    built = {name: build(values.pop(name), types[name], f"{where}.{name}") for name in parts}
    if not built:
        return parse(OmegaConf.create(values), cls, f"{where}.")
    plain = dataclasses.make_dataclass(
        cls.__name__, [(f.name, types[f.name], f) for f in fields if f.name not in parts]
    )
    rest = dataclasses.asdict(parse(OmegaConf.create(values), plain, f"{where}."))
    try:
        return cls(**rest, **built)
    except ValueError as error:
        raise UserError(f"{where}.{error}") from None


def name_problems(**names: str) -> list[str]:
    """What becomes part of a file's name is no path and no piece of shell. `names`: by key, __ for a dot."""
    return [
        f"{key.replace('__', '.')} becomes part of file names: letters, digits, blanks and . _ - + = @ , alone, and "
        f"not a dot or a blank first, is {name!r}"
        for key, name in names.items()
        if name and not re.fullmatch(r"[\w+=@,-][\w+=@,. -]*", name)
    ]


def check(config: TrainConfig) -> None:
    """Cross-field checks. Raises UserError that lists every problem found."""
    problems = name_problems(model__name=config.model.name, dataset__name=config.dataset.name)
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


def check_sample(config: SampleConfig) -> None:
    """The same for `prefopt.sample`."""
    problems = sampling_problems(config.sampling) + hardware_problems(config)
    problems += sampler_problems(config.samples_per_prompt, config.backend)
    if problems:
        raise UserError("\n".join(problems))


def sampler_problems(samples_per_prompt: int, backend: str) -> list[str]:
    problems = ["samples_per_prompt must be at least 1"] if samples_per_prompt < 1 else []
    if backend not in ("transformers", "vllm"):
        problems.append(f"backend must be transformers or vllm, is {backend!r}")
    elif backend == "vllm" and importlib.util.find_spec("vllm") is None:
        problems.append("backend=vllm needs the package vllm, which is not installed: pip install vllm")
    return problems


def check_harness(config: HarnessConfig) -> None:
    """The same for `prefopt.harness`, with the package that it needs."""
    problems = hardware_problems(config) + name_problems(model__name=config.model.name)
    # lm-eval takes the path of a YAML too, which may name Python code to run.
    for task in [config.tasks] if isinstance(config.tasks, str) else config.tasks:
        problems += name_problems(tasks=str(task))
    if config.checkpoints not in ("final", "all", "initial"):
        problems.append(f"checkpoints must be final, all or initial, is {config.checkpoints!r}")
    if config.batch_size < 1:
        problems.append(f"batch_size must be at least 1, is {config.batch_size}")
    if config.limit is not None and config.limit < 1:
        problems.append(f"limit must be at least 1, or null, is {config.limit}")
    if config.run is None and config.output is None:
        problems.append("give run=FOLDER, or a model with output=FOLDER for its records")
    if importlib.util.find_spec("lm_eval") is None:
        problems.append("prefopt.harness needs the package lm-eval: pip install -e '.[evaluation]'")
    if problems:
        raise UserError("\n".join(problems))


def check_alpaca(config: AlpacaConfig) -> None:
    """The same for `prefopt.alpaca`."""
    problems = sampling_problems(config.sampling) + hardware_problems(config) + sampler_problems(1, config.backend)
    if config.checkpoints not in ("final", "all"):
        problems.append(f"checkpoints must be final or all, is {config.checkpoints!r}")
    if config.max_cost < 0:
        problems.append(f"max_cost must not be negative, is {config.max_cost:g}")
    if importlib.util.find_spec("alpaca_eval") is None:
        problems.append("prefopt.alpaca needs the package alpaca-eval: pip install -e '.[evaluation]'")
    if problems:
        raise UserError("\n".join(problems))


class Hardware(Protocol):
    """Where a job computes, and in which precision; "auto" until `resolve_hardware`."""

    device: str
    precision: str


def check_hardware(config: Hardware) -> None:
    """Raise UserError for a device or a precision that there is not."""
    if problems := hardware_problems(config):
        raise UserError("\n".join(problems))


def resolve(config: TrainConfig) -> None:
    """`resolve_hardware`, and micro_batch_tokens=0 by what suits the device."""
    resolve_hardware(config)
    config.micro_batch_tokens = config.micro_batch_tokens or micro_batch_tokens(config.device)


def resolve_hardware(config: Hardware) -> None:
    """Replace device=auto and precision=auto by what they mean on this machine, so that records name it.

    bfloat16 is chosen where the hardware multiplies it natively: emulated, it is many times slower than float32.
    """
    import torch

    if config.device == "auto":
        config.device = "cuda" if torch.cuda.is_available() else "cpu"
    if config.precision == "auto":
        if config.device.startswith("cuda"):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        config.precision = "bfloat16" if native else "float32"


def micro_batch_tokens(device: str) -> int:
    """What suits the device: a CPU gains nothing from more than 1024 tokens at a time, a GPU does."""
    return 8192 if device.startswith("cuda") else 1024


def sampling_problems(sampling: SamplingConfig) -> list[str]:
    rules = [
        (sampling.temperature >= 0, f"sampling.temperature must not be negative, is {sampling.temperature}"),
        (0 < sampling.top_p <= 1, f"sampling.top_p must be above 0 and at most 1, is {sampling.top_p}"),
        (sampling.max_new_tokens >= 1, "sampling.max_new_tokens must be at least 1"),
        (sampling.batch_size >= 1, "sampling.batch_size must be at least 1"),
    ]
    return [message for holds, message in rules if not holds]


def hardware_problems(config: Hardware) -> list[str]:
    import torch

    problems = []
    if config.precision not in ("auto", "bfloat16", "float32"):
        problems.append(f"precision must be auto, bfloat16 or float32, is {config.precision!r}")
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    devices = ["auto", "cpu", *(["cuda", *gpus] if gpus else [])]
    if config.device not in devices:
        problems.append(f"device {config.device!r} is not there. This machine has: {', '.join(devices)}")
    return problems


def _texts(node: Any, where: str) -> Iterator[tuple[str, str]]:
    """(key, text) of all texts below a node; `where` leads the keys."""
    if isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _texts(value, f"{where}{key}" if isinstance(value, str) else f"{where}{key}.")
    elif isinstance(node, str):
        yield where, node


def unknown_key(name: str, known: list[str]) -> str:
    """What to say of a dotted key whose last part is none of `known`."""
    prefix, dot, key = name.rpartition(".")
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"Did you mean {prefix}{dot}{near[0]}?" if near else f"The keys here are: {', '.join(known) or 'none'}."
    return f"unknown key {name}. {hint}"


def _unknown_keys(node: Any, schema: type, prefix: str) -> list[str]:
    fields = {f.name: f.type for f in dataclasses.fields(schema)}
    problems = []
    for key in node:
        name = f"{prefix}{key}"
        if key not in fields:
            problems.append(unknown_key(name, list(fields)))
        elif dataclasses.is_dataclass(fields[key]) and OmegaConf.is_dict(node) and not OmegaConf.is_missing(node, key):
            child = node[key]
            if OmegaConf.is_dict(child):
                problems += _unknown_keys(child, fields[key], f"{name}.")  # type: ignore[arg-type]
    return problems


def _not_finite(value: Any, key: str) -> list[str]:
    """Each rule for a number would have to think of NaN, which is neither above nor below anything, and of infinity."""
    if isinstance(value, dict):
        return [problem for k, v in value.items() for problem in _not_finite(v, f"{key}{k}.")]
    if isinstance(value, list):
        return [problem for i, v in enumerate(value) for problem in _not_finite(v, f"{key[:-1]}[{i}].")]
    bad = isinstance(value, float) and not math.isfinite(value)
    return [f"{key[:-1]} must be a finite number, is {value}"] if bad else []


def _describe(error: OmegaConfBaseException) -> str:
    if isinstance(error, InterpolationToMissingValueError):
        lacking = str(error.msg).partition("Missing mandatory value: ")[2].split()[0]
        return f"no value for {lacking}. Give it on the command line: {lacking}=VALUE"
    key = error.full_key or ""
    message = (error.msg or str(error)).splitlines()[0]
    return f"{key}: {message}" if key and key not in message else message
