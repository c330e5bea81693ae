"""Odds ratio preference optimization (Hong et al. 2024, arXiv 2403.07691)."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefopt.objectives.base import PairInputs, Pairwise, require, saturated


@dataclass(frozen=True)
class ORPO(Pairwise):
    """loss = -nll_weight lp_w / n_w - odds_weight log sigma(s_w - s_l),  s = log(p / (1 - p)),  p = exp(lp / n).

    Supervised fine-tuning plus the log odds ratio of the per-token geometric means; no reference. `odds_weight` is the
    paper's lambda. Scores are s. Raises ValueError for odds_weight <= 0.
    """

    equation = "−lp_w/n_w − λ log σ(s_w − s_l), s = log p/(1−p), p = exp(lp/n)"
    paper = "2403.07691"
    summary = "fine-tuning and preference in one, by the odds of the two completions"

    odds_weight: float
    nll_weight: float = field(default=1.0, kw_only=True)
    nll_per: str = field(default="own_token", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.odds_weight > 0, f"odds_weight must be positive, got {self.odds_weight}")

    def scores(self, inputs: PairInputs) -> tuple[Tensor, Tensor]:
        return (
            _log_odds(inputs.policy_chosen_logps / inputs.chosen_lengths),
            _log_odds(inputs.policy_rejected_logps / inputs.rejected_lengths),
        )

    def losses(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> Tensor:
        return -self.odds_weight * logsigmoid(chosen - rejected)

    def diagnostics(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
        return {"saturation": saturated(chosen - rejected), "log_odds_ratio": chosen - rejected}


def _log_odds(logps: Tensor) -> Tensor:
    """log p - log(1 - p) from log p, without the cancellation of 1 - p near p = 1; at most 16 (p = 1 - 1e-7)."""
    logps = logps.clamp(max=-1e-7)
    # Two branches, each exact where it is used; the other one gets a harmless argument, so no gradient is nan.
    near = logps > -math.log(2)
    log1mexp = torch.where(
        near,
        torch.log(-torch.expm1(torch.where(near, logps, -1.0))),
        torch.log1p(-torch.exp(torch.where(near, -1.0, logps))),
    )
    return logps - log1mexp
