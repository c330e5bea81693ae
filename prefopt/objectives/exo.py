"""Efficient exact optimization on pairs (Ji et al. 2024, EXO, arXiv 2402.00856, Eq. 16)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefopt.objectives.base import ImplicitReward, PairInputs, require


@dataclass(frozen=True)
class EXO(ImplicitReward):
    """loss = KL(q || p) = q log(q / (1 - e)) + (1 - q) log((1 - q) / e),  q = sigma(z),  z = beta (u_w - u_l).

    The reverse KL from the policy's preference q to the smoothed label p = (1 - e, e): it seeks a mode, where DPO, the
    forward KL, covers both. `label_smoothing` e must be positive, since at 0 the loss is infinite; the authors' code
    (github.com/haozheji/exact-optimization) writes log e = -10 and log(1 - e) = 0. Its learning rate is 1e-6. DMPO's
    language-model form (arXiv 2507.07510) is this loss. Scores are beta * u.
    Raises ValueError for beta <= 0 or e outside (0, 0.5).
    """

    equation = "q log(q/(1−ε)) + (1−q) log((1−q)/ε), q = σ(β(u_w − u_l))"
    paper = "2402.00856, Eq. 16"
    summary = "DPO with the reverse KL between preferences, which seeks a mode instead of covering both"

    label_smoothing: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.label_smoothing < 0.5, f"label_smoothing must be in (0, 0.5), got {self.label_smoothing}")

    @property
    def loss_at_reference(self) -> float:  # type: ignore[override]
        return -math.log(2) - (math.log1p(-self.label_smoothing) + math.log(self.label_smoothing)) / 2

    def losses(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> Tensor:
        z = chosen - rejected
        right = torch.sigmoid(z) * (logsigmoid(z) - math.log1p(-self.label_smoothing))
        return right + torch.sigmoid(-z) * (logsigmoid(-z) - math.log(self.label_smoothing))
