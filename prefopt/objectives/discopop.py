"""Discovered preference optimization (Lu et al. 2024, DiscoPOP, arXiv 2406.08414, Eq. 5)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefopt.objectives.base import ImplicitReward, PairInputs, clamped_exp, require


@dataclass(frozen=True)
class DiscoPOP(ImplicitReward):
    """loss = -(1 - m) log sigma(z) + m exp(-z),  m = sigma(z / tau),  z = beta (u_w - u_l).

    A blend of the logistic and the exponential loss that a search by a language model found. It is not convex: it has a
    dip beside a bump at small positive z. At the reference, z = 0, it rises with z where tau < (1 - log 2) / 3 = 0.102:
    its gradient begins by preferring the rejected completion. m exp(-z) is computed as one exponential, as exp(-z)
    alone overflows for a very negative z, where m is 0. The formula and tau 0.05 follow TRL 1.16. Scores are beta * u.
    Raises ValueError for beta <= 0 or tau <= 0.
    """

    equation = "−(1−m) log σ(z) + m e^−z, m = σ(z/τ), z = β(u_w − u_l)"
    paper = "2406.08414, Eq. 5"
    summary = "a loss of DPO's margin that a search found: logistic for wrong pairs, exponential for right ones"
    loss_at_reference = (1 + math.log(2)) / 2

    tau: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.tau > 0, f"tau must be positive, got {self.tau}")

    def losses(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> Tensor:
        z = chosen - rejected
        exponential = clamped_exp(logsigmoid(z / self.tau) - z)
        return exponential - torch.sigmoid(-z / self.tau) * logsigmoid(z)
