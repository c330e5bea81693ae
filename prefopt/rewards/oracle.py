"""Oracles: functions (prompt, response) -> reward in [0, 1], which stand for the true preferences."""

import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from prefopt.data.items import Message
from prefopt.errors import UserError


class Oracle(ABC):
    """The base class of oracles. One is a frozen dataclass, which a data set's YAML names by `_target_` under
    `oracle`."""

    @abstractmethod
    def __call__(self, prompt: list[Message], response: str) -> float:
        """The reward of one response, in [0, 1]."""


@dataclass(frozen=True)
class Vader(Oracle):
    """VADER's compound sentiment (Hutto & Gilbert 2014) of the response alone, mapped from [-1, 1] to [0, 1].

    Building it raises UserError where the package vaderSentiment is missing.
    """

    def __post_init__(self) -> None:
        _analyzer()  # fails now rather than at the first response

    def __call__(self, prompt: list[Message], response: str) -> float:
        return (_analyzer().polarity_scores(response)["compound"] + 1) / 2


@functools.cache
def _analyzer() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise UserError("the sentiment oracle needs the package vaderSentiment: pip install -e '.[offline]'") from None
    return SentimentIntensityAnalyzer()
