"""Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290, Eq. 7)."""

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from prefopt.objectives.base import ImplicitReward, PairInputs, require


@dataclass(frozen=True)
class DPO(ImplicitReward):
    """loss = -(1 - e) log sigma(z) - e log sigma(-z),  z = beta (u_w - u_l),  u = log pi - log pi_ref.

    `label_smoothing` e is the assumed rate of flipped labels (the cDPO note by Mitchell, 2023); 0 is plain DPO.
    Scores are beta * u. Raises ValueError for beta <= 0 or e outside [0, 0.5).
    """

    equation = "−(1−ε) log σ(z) − ε log σ(−z), z = β(u_w − u_l)"
    paper = "2305.18290, Eq. 7"
    summary = "the standard: raises the log-ratio of the chosen completion over that of the rejected one"
    loss_at_reference = math.log(2)

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.label_smoothing < 0.5, f"label_smoothing must be in [0, 0.5), got {self.label_smoothing}")

    def losses(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> Tensor:
        z = chosen - rejected
        return -(1 - self.label_smoothing) * logsigmoid(z) - self.label_smoothing * logsigmoid(-z)
