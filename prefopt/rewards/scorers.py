"""Scorers, which give a reward to a response: sentiment, a Python function, columns that the rows already have, or a
reward model (reward_model.py).

Each is a dataclass that a YAML of conf/scorer names by `_target_`. "Reward" is the number, on any scale; `probability`
maps it to [0, 1]. As `dataset.oracle`, a scorer gives the samples of a run's evaluations their rewards.
"""

import functools
import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from prefopt.config.schema import ModelConfig
from prefopt.data.fields import finite
from prefopt.data.items import Message
from prefopt.errors import UserError
from prefopt.utils.distributed import broadcast, is_main_process


@dataclass(frozen=True)
class Request:
    """A response that is to get a reward."""

    row: dict[str, Any]  # the row that holds the response
    key: str | int  # which response of the row: "chosen", "rejected", or its number in `responses`
    prompt: list[Message]
    response: str
    finished: bool  # False: the response was cut off, so no terminator belongs behind it
    where: str  # the row's name in messages


class RewardScorer(ABC):
    """Gives a reward to a response. The higher the better; the scale is the scorer's.

    Several processes call `rewards_shared`.
    """

    reads_rows: ClassVar[bool] = False  # whether it looks at more of a row than prompt and response: none for samples

    @property
    @abstractmethod
    def label(self) -> str:
        """The scorer's name in tables and figures."""

    @abstractmethod
    def rewards(self, requests: Sequence[Request], device: str, precision: str, show: bool = True) -> list[float]:
        """The rewards of the requests, in their order. `show`: show progress. Raises UserError, naming the row, for a
        response that can have no reward."""

    def further_figures(self, requests: Sequence[Request]) -> dict[str, list[float]]:
        """By name, what else it knows of each response. A run's evaluation gives the mean over its samples, as
        `sample_NAME`."""
        return {}

    @property
    def model(self) -> ModelConfig | None:
        """The model that it loads, and releases, in each call of `rewards`; None where it has none. With a model,
        `rewards` is a collective: the processes share the responses."""
        return None

    def model_files(self) -> dict[str, str]:
        """The digests of the files of its model (`models.fingerprint.local_files`); {} where it has none."""
        from prefopt.models.fingerprint import local_files

        return local_files(self.model) if self.model else {}

    def probability(self, reward: float) -> float:
        """The reward on [0, 1], for objectives that need it there: sigma(reward), if it is not there already."""
        # Two forms, because exp of a large positive number overflows.
        return 1 / (1 + math.exp(-reward)) if reward >= 0 else math.exp(reward) / (1 + math.exp(reward))


def rewards_shared(
    scorer: RewardScorer, requests: Sequence[Request], device: str, precision: str, show: bool
) -> list[float]:
    """`scorer.rewards`, in all processes. A scorer without a model is called in the main one only: a function of the
    user's may cost money, or give another answer each time."""
    if scorer.model:
        return scorer.rewards(requests, device, precision, show)
    return broadcast(scorer.rewards(requests, device, precision, show) if is_main_process() else [])


@dataclass(frozen=True)
class Vader(RewardScorer):
    """VADER's compound sentiment (Hutto & Gilbert 2014) of the response alone, mapped from [-1, 1] to [0, 1].

    Building it raises UserError where the package vaderSentiment is missing.
    """

    def __post_init__(self) -> None:
        _analyzer()  # fails now rather than at the first response

    @property
    def label(self) -> str:
        return "Vader"

    def rewards(self, requests: Sequence[Request], device: str, precision: str, show: bool = True) -> list[float]:
        return [(_analyzer().polarity_scores(r.response)["compound"] + 1) / 2 for r in requests]

    def probability(self, reward: float) -> float:
        return reward


@functools.cache
def _analyzer() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise UserError("the sentiment scorer needs the package vaderSentiment: pip install -e '.[offline]'") from None
    return SentimentIntensityAnalyzer()


@dataclass(frozen=True)
class Function(RewardScorer):
    """A Python function, named as package.module.function, that is called once for all responses.

    It gets a list of prompts (each a list of messages) and the list of responses to them (texts), and returns a finite
    number for each, in a list or an array.
    """

    function: str

    def __post_init__(self) -> None:
        _function(self.function)  # fails now rather than at the first response

    @property
    def label(self) -> str:
        return self.function.rpartition(".")[2]

    def rewards(self, requests: Sequence[Request], device: str, precision: str, show: bool = True) -> list[float]:
        returned = _function(self.function)([r.prompt for r in requests], [r.response for r in requests])
        values = [v.item() if hasattr(v, "item") else v for v in returned]  # of an array or tensor
        if len(values) != len(requests):
            raise UserError(f"{self.function} returned {len(values)} rewards for {len(requests)} responses.")
        try:
            return [finite(v, f"{self.function}'s reward of {r.where}") for r, v in zip(requests, values, strict=True)]
        except ValueError as error:
            raise UserError(f"{error}.") from None


def _function(name: str) -> Callable[..., Any]:
    module, _, attribute = name.rpartition(".")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever importing somebody's module raises
        raise ValueError(f"function: cannot import {name!r}: {error}") from None
    if not callable(function):
        raise ValueError(f"function: {name} is no function: {function!r}")
    return function


@dataclass(frozen=True)
class Columns(RewardScorer):
    """Rewards that the rows already hold.

    `chosen` and `rejected` are the names of the fields for a pair, `responses` that of the list with one reward per
    response; a dot leads into a nested object. `scale` is [lowest, highest] of the possible rewards, which are then
    mapped to [0, 1] linearly; None: by sigma.
    """

    reads_rows: ClassVar[bool] = True

    chosen: str = "score_chosen"
    rejected: str = "score_rejected"
    responses: str = "scores"
    scale: list[float] | None = None

    def __post_init__(self) -> None:
        if self.scale is not None and not (len(self.scale) == 2 and self.scale[0] < self.scale[1]):
            raise ValueError(f"scale must be [lowest, highest], is {self.scale}")

    @property
    def label(self) -> str:
        return "the rows' own columns"

    def rewards(self, requests: Sequence[Request], device: str, precision: str, show: bool = True) -> list[float]:
        return [self._reward(r) for r in requests]

    def _reward(self, request: Request) -> float:
        field = getattr(self, request.key if isinstance(request.key, str) else "responses")
        value: Any = request.row
        try:
            for key in field.split("."):
                value = value[key]
            value = finite(value if isinstance(request.key, str) else value[request.key], f"field {field!r}")
        except (KeyError, TypeError, IndexError):
            raise UserError(
                f"{request.where} has no number {field!r} (its fields: {', '.join(request.row)}). Name the fields by "
                "scorer.chosen and scorer.rejected, or scorer.responses."
            ) from None
        except ValueError as error:
            raise UserError(f"{request.where}: {error}.") from None
        if self.scale is not None and not self.scale[0] <= value <= self.scale[1]:
            raise UserError(f"{request.where}: {field} {value:g} is outside scorer.scale={self.scale}.")
        return value

    def probability(self, reward: float) -> float:
        if self.scale is None:
            return super().probability(reward)
        return (reward - self.scale[0]) / (self.scale[1] - self.scale[0])
