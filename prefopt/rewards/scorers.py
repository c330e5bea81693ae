"""Where rewards come from: a reward model, an oracle, or columns that the rows already have. One dataclass each, named
by a YAML in conf/scorer."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prefopt.data.formats import Message, finite
from prefopt.errors import UserError
from prefopt.rewards.oracle import Oracle


@dataclass(frozen=True)
class Request:
    """A response to score: `key` says which of its row's it is, "chosen", "rejected" or its number, and `where` what to
    call the row in a message. A response that is not `finished` was cut off, and gets no terminator."""

    row: dict[str, Any]
    key: str | int
    prompt: list[Message]
    response: str
    finished: bool
    where: str


class RewardScorer(ABC):
    @property
    @abstractmethod
    def label(self) -> str:
        """What to call it beside a figure."""

    @abstractmethod
    def rewards(self, requests: Sequence[Request], device: str, precision: str, show: bool = True) -> list[float]:
        """Raises UserError for what cannot be scored."""

    def probability(self, reward: float) -> float:
        """The same on [0, 1], for objectives that want it there: sigma(r), unless r is there already."""
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
    """Numbers that the rows carry in the fields `chosen` and `rejected`, or, one for each response, in the list
    `responses`; a dot leads into a nested object. `scale`: the lowest and the highest there can be."""

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
