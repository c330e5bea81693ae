"""The fields of the programs that report."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from prefopt.config.schema import DatasetConfig, ModelConfig
from prefopt.evaluation.config import AlpacaConfig


@dataclass
class ReportConfig:
    """What `python -m prefopt.report` reads (conf/report.yaml)."""

    runs_dir: str = MISSING
    output: str = MISSING
    columns: str | None = None
    compare: list[str] = field(default_factory=list)


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
class CompareConfig(AlpacaConfig):
    """What `python -m prefopt.compare` reads (conf/compare.yaml)."""

    judge: Any = None
    third: str | None = None
    limit: int | None = None


@dataclass
class ClaimsConfig:
    """What `python -m prefopt.claims` reads (conf/claims.yaml)."""

    scales: dict[str, str | None] = field(default_factory=dict)
    published: str = MISSING
    output: str = MISSING


@dataclass
class DataReportConfig:
    """What `python -m prefopt.data_report` reads (conf/data_report.yaml)."""

    model: ModelConfig = field(default_factory=ModelConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    max_prompt_tokens: int = MISSING
    max_completion_tokens: int = MISSING
    evaluation_prompts: list[str] = field(default_factory=list)
    output: str = MISSING
