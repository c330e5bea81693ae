"""The configurations of the jobs that evaluate a policy, and their checks."""

import importlib.util
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from prefopt.config.hardware import hardware_problems
from prefopt.config.parse import file_name_problems
from prefopt.config.schema import ModelConfig, SamplingConfig
from prefopt.errors import UserError
from prefopt.generation.config import sampler_problems


@dataclass
class HarnessConfig:
    """The keys of `python -m prefopt.harness`. conf/harness.yaml has their defaults and explains them."""

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
    """The keys of `python -m prefopt.alpaca`. conf/alpaca.yaml has their defaults and explains them."""

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


def check_harness(config: HarnessConfig) -> None:
    """Raise one UserError with everything that is wrong in a harness job's configuration, or where lm-eval is not
    installed."""
    problems = hardware_problems(config) + file_name_problems({"model.name": config.model.name})
    # lm-eval also takes the path of a YAML, which may name Python code to run. So only names are allowed.
    for task in [config.tasks] if isinstance(config.tasks, str) else config.tasks:
        problems += file_name_problems({"tasks": str(task)})
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
    """Raise one UserError with everything that is wrong in an AlpacaEval job's configuration, or where alpaca-eval is
    not installed."""
    problems = hardware_problems(config) + sampler_problems(1, config.backend)
    if config.checkpoints not in ("final", "all"):
        problems.append(f"checkpoints must be final or all, is {config.checkpoints!r}")
    if config.max_cost < 0:
        problems.append(f"max_cost must not be negative, is {config.max_cost:g}")
    if importlib.util.find_spec("alpaca_eval") is None:
        problems.append("prefopt.alpaca needs the package alpaca-eval: pip install -e '.[evaluation]'")
    if problems:
        raise UserError("\n".join(problems))
