"""Kahneman-Tversky optimization on pairs (Ethayarajh et al. 2024, arXiv 2402.01306)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from prefopt.objectives.base import ImplicitReward, PairInputs, require, saturated


@dataclass(frozen=True)
class KTO(ImplicitReward):
    """loss = (d (1 - sigma(beta u_w - beta z)) + r (1 - sigma(beta z - beta u_l))) / 2.

    Each pair is one desirable (weight d) and one undesirable (weight r) example; the loss is their mean. The reference
    point z, detached, is max(0, mean of the log-ratios u of all completions of the optimizer step). The paper estimates
    it from completions under other examples' prompts, which costs another forward pass of both models; the pairs' own
    completions cost nothing. Scores are beta * u. Raises ValueError for beta <= 0 or a weight < 0.
    """

    equation = "½(1 − σ(β(u_w − z))) + ½(1 − σ(β(z − u_l))), z = max(0, mean u over the step)"
    paper = "2402.01306"
    scope = "step"

    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.desirable_weight >= 0, f"desirable_weight must not be negative, got {self.desirable_weight}")
        require(self.undesirable_weight >= 0, f"undesirable_weight must not be negative, got {self.undesirable_weight}")

    @property
    def loss_at_reference(self) -> float:  # type: ignore[override]
        return (self.desirable_weight + self.undesirable_weight) / 4

    def losses(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> Tensor:
        point = _reference_point(chosen, rejected)
        desirable = self.desirable_weight * torch.sigmoid(point - chosen)
        undesirable = self.undesirable_weight * torch.sigmoid(rejected - point)
        return (desirable + undesirable) / 2

    def diagnostics(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
        point = _reference_point(chosen, rejected)
        return {
            "reference_point": point / self.beta,
            "chosen_saturation": saturated(chosen - point),
            "rejected_saturation": saturated(point - rejected),
        }


def _reference_point(chosen: Tensor, rejected: Tensor) -> Tensor:
    """beta z, 0-dim: `chosen` and `rejected` already contain beta."""
    return torch.cat([chosen, rejected]).detach().mean().clamp(min=0)
