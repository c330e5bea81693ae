"""The configurations of the jobs that evaluate a policy, and their checks."""

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from prefopt.config.hardware import hardware_problems
from prefopt.config.parse import file_name_problems
from prefopt.config.schema import ModelConfig, SamplingConfig, ServerConfig
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
    batch_size: Any = MISSING
    precision: str = MISSING
    device: str = MISSING
    system_instruction: str | None = None
    gen_kwargs: dict[str, Any] = field(default_factory=dict)
    max_length: int | None = None
    include: str | None = None


@dataclass
class AlpacaConfig:
    """The keys of `python -m prefopt.alpaca`. conf/alpaca.yaml has their defaults and explains them."""

    judge: Any = MISSING
    launcher: Any = MISSING
    run: str | None = None
    checkpoints: str = MISSING
    baseline: str = MISSING
    instructions: str | None = None
    split: str | None = None
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    backend: str = MISSING
    server: ServerConfig = field(default_factory=ServerConfig)
    max_cost: float = MISSING
    seed: int = MISSING
    precision: str = MISSING
    device: str = MISSING
    model: ModelConfig = field(default_factory=ModelConfig)
    model_outputs: str | None = None
    output: str | None = None


@dataclass
class JudgedConfig:
    """The keys that prefopt.mtbench and prefopt.arena share."""

    judge: Any = MISSING
    launcher: Any = MISSING
    run: str | None = None
    checkpoints: str = MISSING
    answers: str | None = None
    output: str | None = None
    files: str | None = None
    max_new_tokens: int = MISSING
    batch_size: int = MISSING
    backend: str = MISSING
    server: ServerConfig = field(default_factory=ServerConfig)
    max_cost: float = MISSING
    seed: int = MISSING
    precision: str = MISSING
    device: str = MISSING
    model: ModelConfig = field(default_factory=ModelConfig)


@dataclass
class MtbenchConfig(JudgedConfig):
    """The keys of `python -m prefopt.mtbench`. conf/mtbench.yaml has their defaults and explains them."""

    references: str = MISSING


@dataclass
class ArenaConfig(JudgedConfig):
    """The keys of `python -m prefopt.arena`. conf/arena.yaml has their defaults and explains them."""

    version: str = MISSING
    baseline: str | None = None


@dataclass
class JudgeCheckConfig:
    """The keys of `python -m prefopt.judge_check`. conf/judge_check.yaml has their defaults and explains them."""

    judge: Any = MISSING
    ratings: str | None = None
    verdicts: str | None = None
    files: str | None = None
    max_cost: float = MISSING


@dataclass
class RankConfig:
    """The keys of `python -m prefopt.rank`. conf/rank.yaml has their defaults and explains them."""

    judge: Any = MISSING
    input: str = MISSING
    output: str = MISSING
    split: str | None = None
    max_cost: float = MISSING


def check_rank(config: RankConfig) -> None:
    """Raise UserError for a wrong cost."""
    if config.max_cost < 0:
        raise UserError(f"max_cost must not be negative, is {config.max_cost:g}")


def check_harness(config: HarnessConfig) -> None:
    """Raise one UserError with everything that is wrong in a harness job's configuration, or where lm-eval is not
    installed."""
    problems = hardware_problems(config) + file_name_problems({"model.name": config.model.name})
    # lm-eval also takes the path of a YAML, which may name Python code to run. So only names are allowed.
    for task in [config.tasks] if isinstance(config.tasks, str) else config.tasks:
        problems += file_name_problems({"tasks": str(task)})
    if config.checkpoints not in ("final", "all", "initial"):
        problems.append(f"checkpoints must be final, all or initial, is {config.checkpoints!r}")
    if config.batch_size != "auto" and (not _is_integer(config.batch_size) or config.batch_size < 1):
        problems.append(f"batch_size must be at least 1, or auto, is {config.batch_size!r}")
    if config.max_length is not None and config.max_length < 2:
        problems.append(f"max_length must be at least 2 tokens, or null, is {config.max_length}")
    if config.include is not None and not Path(config.include).is_dir():
        problems.append(f"include={config.include} is no folder. It names one that holds YAML files of lm-eval tasks")
    if config.system_instruction is not None and not config.system_instruction.strip():
        problems.append("system_instruction is empty: leave it out")
    problems += gen_kwargs_problems(config.gen_kwargs)
    if config.limit is not None and config.limit < 1:
        problems.append(f"limit must be at least 1, or null, is {config.limit}")
    if config.run is None and config.output is None:
        problems.append("give run=FOLDER, or a model with output=FOLDER for its records")
    if importlib.util.find_spec("lm_eval") is None:
        problems.append("prefopt.harness needs the package lm-eval: pip install -e '.[evaluation]'")
    if problems:
        raise UserError("\n".join(problems))


# What may stand in `gen_kwargs`. `DRAWING`: transformers reads them where do_sample is true.
DRAWING = ("temperature", "top_p", "top_k", "min_p")
GEN_KWARGS: dict[str, tuple[tuple[type, ...], str]] = {
    "until": ((str, list), "a text or a list of texts"),
    "max_gen_toks": ((int,), "a whole number"),
    "do_sample": ((bool,), "true or false"),
    **dict.fromkeys([*DRAWING, "repetition_penalty"], ((int, float), "a number")),
    **dict.fromkeys(["no_repeat_ngram_size", "num_beams"], ((int,), "a whole number")),
}


def gen_kwargs_problems(given: dict[str, Any]) -> list[str]:
    """Messages about `gen_kwargs` that lm-eval would refuse late, or ignore; empty where all is well."""
    problems = []
    for key, value in given.items():
        if key not in GEN_KWARGS:
            problems.append(f"gen_kwargs.{key}: lm-eval may ignore it. There is {', '.join(GEN_KWARGS)}")
            continue
        kinds, words = GEN_KWARGS[key]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            problems.append(f"gen_kwargs.{key} must be {words}, is {value!r}")
    if problems:
        return problems

    drawing = [key for key in DRAWING if key in given]
    if drawing and not given.get("do_sample"):
        problems.append(f"gen_kwargs.{drawing[0]} has no effect without gen_kwargs.do_sample=true")
    if given.get("do_sample") and not given.get("temperature", 0) > 0:
        problems.append("gen_kwargs.do_sample=true needs a temperature above 0: most tasks set it to 0")
    if given.get("max_gen_toks", 1) < 1:
        problems.append(f"gen_kwargs.max_gen_toks must be at least 1, is {given['max_gen_toks']}")
    return problems


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_alpaca(config: AlpacaConfig) -> None:
    """Raise one UserError with everything that is wrong in an AlpacaEval job's configuration, or where alpaca-eval is
    not installed."""
    problems = hardware_problems(config) + sampler_problems(1, config.backend)
    if config.checkpoints not in ("final", "all"):
        problems.append(f"checkpoints must be final or all, is {config.checkpoints!r}")
    if config.run is not None and config.model_outputs is not None:
        problems.append("run and model_outputs are two: give one of them")
    if config.run is None and config.output is None:
        problems.append("give run=FOLDER; or a model, or model_outputs=FILE, with output=FOLDER for the results")
    if config.max_cost < 0:
        problems.append(f"max_cost must not be negative, is {config.max_cost:g}")
    if config.judge is not None and importlib.util.find_spec("alpaca_eval") is None:
        problems.append("prefopt.alpaca needs the package alpaca-eval: pip install -e '.[evaluation]'")
    if problems:
        raise UserError("\n".join(problems))


def judged_problems(config: JudgedConfig) -> list[str]:
    """What is wrong in the keys that prefopt.mtbench and prefopt.arena share; empty where all is well."""
    problems = hardware_problems(config) + sampler_problems(1, config.backend)
    if config.checkpoints not in ("final", "all"):
        problems.append(f"checkpoints must be final or all, is {config.checkpoints!r}")
    if config.run is not None and config.answers is not None:
        problems.append("run and answers are two: give one of them")
    if config.run is None and config.output is None:
        problems.append("give run=FOLDER; or a model, or answers=FILE, with output=FOLDER for the results")
    problems += [f"{key} must be at least 1" for key in ("max_new_tokens", "batch_size") if getattr(config, key) < 1]
    return problems + _benchmark_problems(config)


def _benchmark_problems(config: JudgedConfig | JudgeCheckConfig) -> list[str]:
    problems = []
    if config.files is not None and not Path(config.files).expanduser().is_dir():
        problems.append(f"files={config.files} is no folder. It names one that holds the benchmark's files")
    if config.max_cost < 0:
        problems.append(f"max_cost must not be negative, is {config.max_cost:g}")
    return problems


def check_judge_check(config: JudgeCheckConfig) -> None:
    """Raise one UserError with everything that is wrong in the configuration of a judge's check."""
    problems = _benchmark_problems(config)
    if config.ratings is None and config.verdicts is None:
        problems.append("give published judgments: ratings=FILE of FastChat's, verdicts=FILE of Arena-Hard's, or both")
    if problems:
        raise UserError("\n".join(problems))


def check_mtbench(config: MtbenchConfig) -> None:
    """Raise one UserError with everything that is wrong in an MT-Bench job's configuration."""
    problems = judged_problems(config)
    if config.references not in ("gpt-4", "gpt-4-0125-preview"):
        problems.append(f"references must be gpt-4 or gpt-4-0125-preview, is {config.references!r}")
    if problems:
        raise UserError("\n".join(problems))


def check_arena(config: ArenaConfig) -> None:
    """Raise one UserError with everything that is wrong in an Arena-Hard job's configuration."""
    problems = judged_problems(config)
    if config.version not in ("v0.1", "v2.0"):
        problems.append(f"version must be v0.1 or v2.0, is {config.version!r}")
    if problems:
        raise UserError("\n".join(problems))


@dataclass
class RewardBenchConfig:
    """The keys of `python -m prefopt.reward_bench`. conf/reward_bench.yaml has their defaults and explains them."""

    launcher: Any = MISSING
    scorer: Any = None
    run: str | None = None
    rows: str = MISSING
    split: str | None = None
    checkpoints: str = MISSING
    output: str | None = None
    max_length: int = MISSING
    precision: str = MISSING
    device: str = MISSING


def check_reward_bench(config: RewardBenchConfig) -> None:
    """Raise one UserError with everything that is wrong in the configuration of `prefopt.reward_bench`."""
    problems = hardware_problems(config)
    if config.checkpoints not in ("final", "all"):
        problems.append(f"checkpoints must be final or all, is {config.checkpoints!r}")
    if config.max_length < 2:
        problems.append(f"max_length must be at least 2 tokens, is {config.max_length}")
    if (config.run is None) == (config.scorer is None):
        problems.append("give either run=FOLDER, or a reward model: scorer=hub_reward_model scorer.path=NAME")
    if config.run is None and config.output is None:
        problems.append("give output=FOLDER for the records of a scorer, which has no run's folder")
    if problems:
        raise UserError("\n".join(problems))
