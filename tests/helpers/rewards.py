"""What scorers say of texts that belong to no row."""

from prefopt.rewards.scorers import Request, RewardScorer


def rewards_of(scorer: RewardScorer, *texts: str) -> list[float]:
    requests = [Request({}, i, [], text, True, f"text {i}") for i, text in enumerate(texts)]
    return scorer.rewards(requests, "cpu", "float32", False)
