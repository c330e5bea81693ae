"""DPO-Positive (Pal et al. 2024, arXiv 2402.13228)."""

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from prefopt.objectives.base import ImplicitReward, PairInputs, require, saturated


@dataclass(frozen=True)
class DPOP(ImplicitReward):
    """loss = -log sigma(z - beta penalty max(0, -u_w)),  z = beta (u_w - u_l),  u = log pi - log pi_ref.

    The penalty acts where the chosen completion is less likely than under the reference, which plain DPO allows as long
    as the rejected one falls faster. `penalty` is the paper's lambda, 50 by its text (5 to 500 work alike), with beta
    0.3; 0 is DPO. The authors' repository (github.com/abacusai/smaug) has no code, and the paper itself was not at
    hand: formula and values follow public implementations that quote it. Scores are beta * u. Raises ValueError for
    beta <= 0 or penalty < 0.
    """

    equation = "−log σ(β(u_w − u_l − λ max(0, −u_w)))"
    paper = "2402.13228"
    summary = "DPO that does not let the chosen completion become less likely than under the reference"
    loss_at_reference = math.log(2)

    penalty: float = 50.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.penalty >= 0, f"penalty must not be negative, got {self.penalty}")

    def _logits(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return chosen - rejected - self.penalty * relu(-chosen)

    def losses(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> Tensor:
        return -logsigmoid(self._logits(chosen, rejected))

    def diagnostics(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
        return {"saturation": saturated(self._logits(chosen, rejected)), "penalized": chosen < 0}
