"""Calibrated DPO (Xiao et al. 2024, arXiv 2412.14516)."""

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from prefopt.objectives.base import PairInputs, Pairwise, require, saturated


@dataclass(frozen=True)
class CalDPO(Pairwise):
    """loss = -log sigma(u_w - u_l) + k ((u_w - 1 / (2 beta))^2 + (u_l + 1 / (2 beta))^2),  u = log pi - log pi_ref.

    The two squares tie the implicit rewards beta u to +-1/2; no beta in the first term. `calibration_weight` k is 1 in
    the paper and 0.5 in the authors' code. Scores are u. Raises ValueError for beta <= 0 or k < 0.
    """

    equation = "−log σ(u_w − u_l) + k(u_w − 1/(2β))² + k(u_l + 1/(2β))²"
    paper = "2412.14516"
    summary = "DPO that also ties the rewards of both sides to fixed targets"
    needs = frozenset({"reference"})

    beta: float
    calibration_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.beta > 0, f"beta must be positive, got {self.beta}")
        require(self.calibration_weight >= 0, f"calibration_weight must not be negative, got {self.calibration_weight}")

    @property
    def loss_at_reference(self) -> float:  # type: ignore[override]
        return math.log(2) + 2 * self.calibration_weight * (1 / (2 * self.beta)) ** 2

    def scores(self, inputs: PairInputs) -> tuple[Tensor, Tensor]:
        return inputs.chosen_logratios, inputs.rejected_logratios

    def losses(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> Tensor:
        target = 1 / (2 * self.beta)
        calibration = (chosen - target) ** 2 + (rejected + target) ** 2
        return -logsigmoid(chosen - rejected) + self.calibration_weight * calibration

    def diagnostics(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
        return {"saturation": saturated(chosen - rejected)}
