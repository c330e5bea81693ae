"""DPO with a budget for the chosen likelihood (Chen et al. 2024, arXiv 2411.05875)."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import relu

from prefopt.objectives.base import PairInputs, require
from prefopt.objectives.dpo import DPO


@dataclass(frozen=True)
class Budget(DPO):
    """loss = DPO's + penalty max(0, -u_w - budget),  u = log pi - log pi_ref.

    The chosen completion may lose `budget` nats against the reference for free, and pays beyond: the paper finds that a
    small loss of likelihood helps, where a likelihood term (`nll_weight`) forbids any. Its text was read, its equation
    was not: form and defaults are inferred. penalty 0 is DPO. Scores are beta * u.
    Raises ValueError for beta <= 0, budget < 0, penalty < 0 or a label_smoothing outside [0, 0.5).
    """

    equation = "−log σ(β(u_w − u_l)) + λ max(0, −u_w − δ), with label smoothing as in dpo"
    paper = "2411.05875, inferred"
    summary = "DPO in which the chosen completion may lose a few nats for free, and pays for more"

    budget: float = 5.0
    penalty: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.budget >= 0, f"budget must not be negative, got {self.budget}")
        require(self.penalty >= 0, f"penalty must not be negative, got {self.penalty}")

    def losses(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> Tensor:
        overdrawn = relu(-chosen / self.beta - self.budget)
        return super().losses(inputs, chosen, rejected) + self.penalty * overdrawn

    def diagnostics(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
        return super().diagnostics(inputs, chosen, rejected) | {"overdrawn": -chosen / self.beta > self.budget}
