"""The laboratory's scorer (docs/laboratory.md)."""

from collections.abc import Sequence
from dataclasses import dataclass

from prefopt.errors import UserError
from prefopt.rewards.scorers import Request, RewardScorer
from prefopt.world import grammar


@dataclass(frozen=True)
class ReviewSentiment(RewardScorer):
    """The sum of a review's graded sentiment, on (0, 1) (`grammar.reward`). It does not depend on the grammar. So of
    samples there are two further figures: which are grammatical, and the reward of these, 0 for the others."""

    @property
    def label(self) -> str:
        return "sentiment"

    def rewards(self, requests: Sequence[Request], device: str, precision: str, show: bool = True) -> list[float]:
        return [grammar.reward(r.response) for r in requests]

    def further_figures(self, requests: Sequence[Request]) -> dict[str, list[float]]:
        kept = [float(is_grammatical(r)) for r in requests]
        rewards = [k * grammar.reward(r.response) for k, r in zip(kept, requests, strict=True)]
        return {"grammatical": kept, "grammatical_reward": rewards}

    def probability(self, reward: float) -> float:
        return reward


def is_grammatical(request: Request) -> bool:
    """Whether the response is finished, and a review of what its prompt asks for. Raises UserError for a prompt of
    another world."""
    try:
        family = grammar.family_of(str(request.prompt[-1]["content"]))
    except ValueError as error:
        raise UserError(f"{request.where}: {error}.") from None
    return request.finished and grammar.parse(family, request.response) is not None
