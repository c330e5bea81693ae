"""The fields of scoring."""

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING


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
