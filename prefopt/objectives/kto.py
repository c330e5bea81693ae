"""Kahneman-Tversky optimization on pairs (Ethayarajh et al. 2024, arXiv 2402.01306)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from prefopt.objectives.base import ImplicitReward, Need, PairInputs, require, saturated


@dataclass(frozen=True)
class KTO(ImplicitReward):
    """loss = (d (1 - sigma(beta (u_w - z))) + r (1 - sigma(beta (z - u_l)))) / 2,  u = log pi - log pi_ref.

    Each pair is one desirable (weight d) and one undesirable (weight r) example; the loss is their mean. The reference
    point z, detached, estimates KL(pi || pi_ref) by max(0, mean log-ratio) over the completions of the whole step:

    * `reference_point=mismatched`: each prompt with the completions of the next pair (`prefopt.data.mismatch`), as in
      the paper and its code. It costs one more forward pass of both models, without gradient.
    * `reference_point=own`: each prompt with its own completions, which costs nothing. They are those that are trained
      up and down, so z follows the rewards themselves, and is no estimate of the KL.

    HALOs (the authors' repository) and TRL's KTOTrainer take unpaired rows and exchange completions among the rows of a
    micro-batch, whatever their labels and prompts. Here chosen completions move to chosen ones and rejected to rejected
    ones, over the whole step, past pairs with the same prompt. HALOs averages over the micro-batches of all devices,
    TRL means of devices; neither averages over accumulated micro-batches, and here z is the same in all of them. Theirs
    is scored with the policy's dropout, ours without.

    Scores are beta * u. Raises ValueError for beta <= 0, a weight < 0 or another reference_point.
    """

    equation = (
        "½(1 − σ(β(u_w − z))) + ½(1 − σ(β(z − u_l))), z = max(0, mean of u over the step's mismatched completions)"
    )
    paper = "2402.01306, Eq. 7"
    summary = "judges each completion alone against a reference point, with a loss that saturates on both sides"
    made_for = frozenset({"noisy_labels"})
    scope = "step"

    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    reference_point: str = "mismatched"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.desirable_weight >= 0, f"desirable_weight must not be negative, got {self.desirable_weight}")
        require(self.undesirable_weight >= 0, f"undesirable_weight must not be negative, got {self.undesirable_weight}")
        require(
            self.reference_point in ("mismatched", "own"),
            f"reference_point must be mismatched or own, got {self.reference_point!r}",
        )

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]
        return frozenset({"reference", "mismatched"} if self.reference_point == "mismatched" else {"reference"})

    @property
    def loss_at_reference(self) -> float:  # type: ignore[override]
        return (self.desirable_weight + self.undesirable_weight) / 4

    def losses(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> Tensor:
        point = self.point(inputs, chosen, rejected)
        desirable = self.desirable_weight * torch.sigmoid(point - chosen)
        undesirable = self.undesirable_weight * torch.sigmoid(rejected - point)
        return (desirable + undesirable) / 2

    def diagnostics(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
        point = self.point(inputs, chosen, rejected)
        return {
            "reference_point": point / self.beta,
            "chosen_saturation": saturated(chosen - point),
            "rejected_saturation": saturated(point - rejected),
        }

    def point(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> Tensor:
        """beta z, 0-dim, detached. The two terms contain beta."""
        if self.reference_point == "mismatched":
            ratios = torch.cat([inputs.mismatched_chosen_logratios, inputs.mismatched_rejected_logratios])
            return self.beta * ratios.detach().mean().clamp(min=0)
        return torch.cat([chosen, rejected]).detach().mean().clamp(min=0)
