"""Scorers, which give a reward to a response: an oracle, columns that the rows already have, or a reward model
(reward_model.py).

Each is a dataclass that a YAML of conf/scorer names by `_target_`. "Reward" is the number, on any scale; `probability`
maps it to [0, 1].
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prefopt.data.fields import finite
from prefopt.data.items import Message
from prefopt.errors import UserError
from prefopt.rewards.oracle import Oracle


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
    """Gives a reward to a response. The higher the better; the scale is the scorer's."""

    @property
    @abstractmethod
    def label(self) -> str:
        """The scorer's name in tables and figures."""

    @abstractmethod
    def rewards(self, requests: Sequence[Request], device: str, precision: str, show: bool = True) -> list[float]:
        """The rewards of the requests, in their order. `show`: show progress. Raises UserError, naming the row, for a
        response that can have no reward."""

    def model_files(self) -> dict[str, str]:
        """The digests of the files of its model (`models.fingerprint.local_files`); none where it has no model."""
        return {}

    def probability(self, reward: float) -> float:
        """The reward on [0, 1], for objectives that need it there: sigma(reward), if it is not there already."""
        # Two forms, because exp of a large positive number overflows.
        return 1 / (1 + math.exp(-reward)) if reward >= 0 else math.exp(reward) / (1 + math.exp(reward))


@dataclass(frozen=True)
class OracleScorer(RewardScorer):
    """An oracle's rewards, which lie in [0, 1]."""

    oracle: Oracle

    @property
    def label(self) -> str:
        return type(self.oracle).__name__

    def rewards(self, requests: Sequence[Request], device: str, precision: str, show: bool = True) -> list[float]:
        return [self.oracle(r.prompt, r.response) for r in requests]

    def probability(self, reward: float) -> float:
        return reward


@dataclass(frozen=True)
class Columns(RewardScorer):
    """Rewards that the rows already hold.

    `chosen` and `rejected` are the names of the fields for a pair, `responses` that of the list with one reward per
    response; a dot leads into a nested object. `scale` is [lowest, highest] of the possible rewards, which are then
    mapped to [0, 1] linearly; None: by sigma.
    """

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
