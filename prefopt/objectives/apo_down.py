"""Anchored preference optimization, down (D'Oosterlinck et al. 2024, arXiv 2408.06266, Eq. 8)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from prefopt.objectives.base import ImplicitReward, PairInputs, saturated


@dataclass(frozen=True)
class APODown(ImplicitReward):
    """loss = sigma(beta u_w) + 1 - sigma(beta (u_w - u_l)),  u = log pi - log pi_ref.

    Both completions become less likely, the rejected one more so. The paper takes it where the chosen completions are
    worse than what the model writes; `apo_zero` otherwise. The formula follows TRL 1.16. Scores are beta * u.
    Raises ValueError for beta <= 0.
    """

    equation = "σ(β u_w) + 1 − σ(β(u_w − u_l))"
    paper = "2408.06266, Eq. 8"
    summary = "moves both completions down, the rejected one more, for chosen ones worse than the model's own"
    loss_at_reference = 1.0

    def losses(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> Tensor:
        return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)

    def diagnostics(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
        return {"saturation": saturated(chosen - rejected), "chosen_saturation": saturated(chosen)}
