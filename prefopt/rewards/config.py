"""The configuration of `prefopt.score`."""

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
