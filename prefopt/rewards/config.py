"""The configurations of `prefopt.score` and `prefopt.token_weights`."""

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING


@dataclass
class ScoreConfig:
    """The keys of `python -m prefopt.score`. conf/score.yaml has their defaults and explains them."""

    scorer: Any = MISSING
    launcher: Any = MISSING
    input: str = MISSING
    output: str = MISSING
    split: str | None = None
    name: str = MISSING
    precision: str = MISSING
    device: str = MISSING


@dataclass
class TokenWeightsConfig:
    """The keys of `python -m prefopt.token_weights`. conf/token_weights.yaml has their defaults and explains them."""

    input: str = MISSING
    output: str = MISSING
    split: str | None = None
    positive: str = MISSING
    negative: str = MISSING
    scale: float = MISSING
    low: float = MISSING
    high: float = MISSING
    precision: str = MISSING
    device: str = MISSING
