"""Margin matching preference optimization: soft labels from quality margins (Kim et al. 2024, arXiv 2410.03145)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefopt.objectives.base import ImplicitReward, PairInputs, require


@dataclass(frozen=True)
class MarginMatching(ImplicitReward):
    """loss = -p log sigma(z) - (1 - p) log sigma(-z),  p = sigma(gamma (r_w - r_l)),  z = beta (u_w - u_l).

    The Bradley-Terry probability p of the data's quality scores replaces the hard label; gamma brings the scores to
    the scale of log-odds (scores in [0, 1] need a larger gamma than scores from 1 to 10). Called MMPO in its paper.
    The authors' repository (github.com/kykim0/margin-matching-pref-opt) has beta 0.01 in all its runs, and for the
    scores of UltraFeedback gamma 2.2 with Gemma 2B and Llama 3 8B, 0.3 with Gemma 7B; for SHP 1.1. Its reward models
    are `objective=reward objective.labels=soft`. Scores are beta * u. Raises ValueError for beta <= 0 or gamma <= 0.
    """

    equation = "−p log σ(z) − (1−p) log σ(−z), p = σ(γ(r_w − r_l)), z = β(u_w − u_l)"
    paper = "2410.03145"
    summary = "DPO with soft labels from the rewards of the two completions"
    made_for = frozenset({"noisy_labels"})
    needs = frozenset({"reference", "rewards"})
    loss_at_reference = math.log(2)

    gamma: float

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.gamma > 0, f"gamma must be positive, got {self.gamma}")

    def losses(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> Tensor:
        return cross_entropy(chosen - rejected, soft_labels(inputs, self.gamma))

    def diagnostics(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
        return super().diagnostics(inputs, chosen, rejected) | {"soft_label": soft_labels(inputs, self.gamma)}


def soft_labels(inputs: PairInputs, gamma: float) -> Tensor:
    """p = sigma(gamma (r_w - r_l)) of the rows' prior rewards, `(B,)`."""
    return torch.sigmoid(gamma * (inputs.chosen_rewards - inputs.rejected_rewards))


def cross_entropy(z: Tensor, p: Tensor | float) -> Tensor:
    """-p log sigma(z) - (1 - p) log sigma(-z): of log-odds z, where the label has probability p."""
    return -p * logsigmoid(z) - (1 - p) * logsigmoid(-z)
