"""Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290, Eq. 7)."""

import math
from dataclasses import dataclass

from torch.nn.functional import logsigmoid

from prefopt.objectives.base import Objective, ObjectiveOutput, PairInputs, require


@dataclass(frozen=True)
class DPO(Objective):
    """loss = -(1 - e) log sigma(z) - e log sigma(-z),  z = beta (u_w - u_l),  u = log pi - log pi_ref.

    `label_smoothing` e is the assumed rate of flipped labels (the cDPO note by Mitchell, 2023); 0 is plain DPO.
    Scores are beta * u. Raises ValueError for beta <= 0 or e outside [0, 0.5).
    """

    needs = frozenset({"reference"})
    step0_loss = math.log(2)

    beta: float
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        require(self.beta > 0, f"beta must be positive, got {self.beta}")
        require(0 <= self.label_smoothing < 0.5, f"label_smoothing must be in [0, 0.5), got {self.label_smoothing}")

    def __call__(self, inputs: PairInputs) -> ObjectiveOutput:
        chosen = self.beta * (inputs.policy_chosen_logps - inputs.reference_chosen_logps)
        rejected = self.beta * (inputs.policy_rejected_logps - inputs.reference_rejected_logps)
        z = chosen - rejected
        losses = -(1 - self.label_smoothing) * logsigmoid(z) - self.label_smoothing * logsigmoid(-z)
        return ObjectiveOutput(losses, chosen.detach(), rejected.detach())
