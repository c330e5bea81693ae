"""Oracles: functions from (prompt, response) to a reward in [0, 1] that stand for the preferences themselves."""

import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from prefopt.data.formats import Message
from prefopt.errors import UserError


class Oracle(ABC):
    """A frozen dataclass; a data set's YAML names it with `_target_` under `oracle`."""

    @abstractmethod
    def __call__(self, prompt: list[Message], response: str) -> float:
        """The reward of one response, in [0, 1]."""


@dataclass(frozen=True)
class Vader(Oracle):
    """VADER's compound sentiment (Hutto & Gilbert 2014), mapped from [-1, 1] to [0, 1]. Looks at the response only.

    Raises UserError, when made, if the package vaderSentiment is missing.
    """

    def __post_init__(self) -> None:
        _analyzer()

    def __call__(self, prompt: list[Message], response: str) -> float:
        return (_analyzer().polarity_scores(response)["compound"] + 1) / 2


@functools.cache
def _analyzer() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise UserError("the sentiment oracle needs the package vaderSentiment: pip install -e '.[offline]'") from None
    return SentimentIntensityAnalyzer()
