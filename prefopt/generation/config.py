"""The configuration of sampling, and its checks."""

import importlib.util
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from prefopt.config.hardware import hardware_problems
from prefopt.config.schema import ModelConfig, SamplingConfig, ServerConfig
from prefopt.errors import UserError


@dataclass
class SampleConfig:
    """The keys of `python -m prefopt.sample`. conf/sample.yaml has their defaults and explains them."""

    model: ModelConfig = field(default_factory=ModelConfig)
    launcher: Any = MISSING
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    prompts: str = MISSING
    output: str = MISSING
    split: str | None = None
    samples_per_prompt: int = MISSING
    keep_responses: bool = MISSING
    backend: str = MISSING
    server: ServerConfig = field(default_factory=ServerConfig)
    seed: int = MISSING
    precision: str = MISSING
    device: str = MISSING


@dataclass
class ChatConfig:
    """The keys of `python -m prefopt.chat`. conf/chat.yaml has their defaults and explains them."""

    model: ModelConfig = field(default_factory=ModelConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    run: str | None = None
    system: str | None = None
    seed: int = MISSING
    precision: str = MISSING
    device: str = MISSING


def check_sample(config: SampleConfig) -> None:
    """Raise one UserError with everything that is wrong in the configuration."""
    problems = hardware_problems(config) + sampler_problems(config.samples_per_prompt, config.backend)
    if problems:
        raise UserError("\n".join(problems))


def sampler_problems(samples_per_prompt: int, backend: str) -> list[str]:
    """Messages about the backend and the number of samples; empty where all is well."""
    problems = ["samples_per_prompt must be at least 1"] if samples_per_prompt < 1 else []
    if backend not in ("transformers", "server"):
        problems.append(f"backend must be transformers or server, is {backend!r}")
    elif backend == "server" and importlib.util.find_spec("openai") is None:
        problems.append("backend=server asks by the package openai, which is not installed: pip install -e '.[server]'")
    return problems
