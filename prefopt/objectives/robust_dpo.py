"""Provably robust DPO under flipped labels (Chowdhury et al. 2024, arXiv 2403.00409)."""

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from prefopt.objectives.base import ImplicitReward, PairInputs, require


@dataclass(frozen=True)
class RobustDPO(ImplicitReward):
    """loss = (-(1 - e) log sigma(z) + e log sigma(-z)) / (1 - 2 e),  z = beta (u_w - u_l).

    An unbiased estimate of DPO's loss when a share e (`flip_rate`) of the labels is flipped; unlike label smoothing it
    is not bounded below. Scores are beta * u. Raises ValueError for beta <= 0 or e outside [0, 0.5).
    """

    equation = "(−(1−ε) log σ(z) + ε log σ(−z)) / (1−2ε), z = β(u_w − u_l)"
    paper = "2403.00409"
    summary = "DPO whose expected loss is that of clean labels where a known share of them is flipped"
    made_for = frozenset({"noisy_labels"})
    loss_at_reference = math.log(2)

    flip_rate: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.flip_rate < 0.5, f"flip_rate must be in [0, 0.5), got {self.flip_rate}")

    def losses(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> Tensor:
        z = chosen - rejected
        return (self.flip_rate * logsigmoid(-z) - (1 - self.flip_rate) * logsigmoid(z)) / (1 - 2 * self.flip_rate)
