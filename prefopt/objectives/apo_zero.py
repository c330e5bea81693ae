"""Anchored preference optimization, zero (D'Oosterlinck et al. 2024, arXiv 2408.06266, Eq. 7)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from prefopt.objectives.base import ImplicitReward, PairInputs, saturated


@dataclass(frozen=True)
class APOZero(ImplicitReward):
    """loss = 1 - sigma(beta u_w) + sigma(beta u_l),  u = log pi - log pi_ref.

    Each side has the reference as its anchor: the chosen completion becomes more likely, the rejected one less. The
    paper takes it where the chosen completions are better than what the model writes; `apo_down` otherwise. The formula
    follows TRL 1.16. Scores are beta * u. Raises ValueError for beta <= 0.
    """

    equation = "1 − σ(β u_w) + σ(β u_l)"
    paper = "2408.06266, Eq. 7"
    summary = "moves the chosen completion up and the rejected one down, for chosen ones better than the model's own"
    loss_at_reference = 1.0

    def losses(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> Tensor:
        return torch.sigmoid(-chosen) + torch.sigmoid(rejected)

    def diagnostics(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
        return {"chosen_saturation": saturated(chosen), "rejected_saturation": saturated(rejected)}
