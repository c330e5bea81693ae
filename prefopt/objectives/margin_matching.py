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
    Scores are beta * u. Raises ValueError for beta <= 0 or gamma <= 0.
    """

    equation = "−p log σ(z) − (1−p) log σ(−z), p = σ(γ(r_w − r_l)), z = β(u_w − u_l)"
    paper = "2410.03145"
    needs = frozenset({"reference", "rewards"})
    loss_at_reference = math.log(2)

    gamma: float

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.gamma > 0, f"gamma must be positive, got {self.gamma}")

    def _labels(self, inputs: PairInputs) -> Tensor:
        """p, `(B,)`: the soft label."""
        return torch.sigmoid(self.gamma * (inputs.chosen_rewards - inputs.rejected_rewards))

    def losses(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> Tensor:
        p, z = self._labels(inputs), chosen - rejected
        return -p * logsigmoid(z) - (1 - p) * logsigmoid(-z)

    def diagnostics(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
        return super().diagnostics(inputs, chosen, rejected) | {"soft_label": self._labels(inputs)}
