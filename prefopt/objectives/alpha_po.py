"""SimPO with another shape of the reward (Gupta et al. 2025, AlphaPO, arXiv 2501.03884)."""

from dataclasses import dataclass

from torch import Tensor

from prefopt.objectives.base import PairInputs, clamped_exp, require
from prefopt.objectives.simpo import SimPO


@dataclass(frozen=True)
class AlphaPO(SimPO):
    """SimPO's loss -log sigma(beta (r_w - r_l) - gamma) of r = (1 - p^-alpha) / alpha,  p = exp(lp / n).

    As alpha falls to 0, r becomes the logarithm of p: SimPO, which `objective=simpo` is. A positive alpha punishes
    unlikely completions more. Exponents beyond 40 nats follow the tangent. The formula follows TRL 1.16's CPOTrainer;
    alpha 0.25 and gamma / beta as SimPO's. Scores are beta * r. Raises ValueError for beta <= 0 or alpha = 0.
    """

    equation = "−log σ(β(r_w − r_l) − γ), r = (1 − p^−α)/α, p = exp(lp/n), γ given as γ/β"
    paper = "2501.03884"
    summary = "SimPO with a reward that bends: a positive alpha keeps likelihoods from collapsing"

    alpha: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.alpha != 0, "alpha must not be 0: that is objective=simpo")

    def scores(self, inputs: PairInputs) -> tuple[Tensor, Tensor]:
        chosen, rejected = super().scores(inputs)  # beta * log p
        return self._shaped(chosen), self._shaped(rejected)

    def _shaped(self, terms: Tensor) -> Tensor:
        return self.beta * (1 - clamped_exp(-self.alpha * terms / self.beta)) / self.alpha
