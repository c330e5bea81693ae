"""Simple preference optimization (Meng et al. 2024, arXiv 2405.14734, Eq. 6)."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from prefopt.objectives.base import PairInputs, Pairwise, require, saturated


@dataclass(frozen=True)
class SimPO(Pairwise):
    """loss = -log sigma(beta (lp_w / n_w - lp_l / n_l) - gamma),  gamma = gamma_beta_ratio * beta; no reference.

    The paper tunes the ratio gamma / beta, so the ratio is what is configured. `length_normalize=false` takes sums
    instead of per-token means; the MMPO paper's published SimPO runs do so. Scores are beta * lp / n (or beta * lp).
    Raises ValueError for beta <= 0.
    """

    equation = "−log σ(β(lp_w/n_w − lp_l/n_l) − γ), γ given as γ/β"
    paper = "2405.14734, Eq. 6"
    summary = "DPO's comparison per token, without a reference and with a target margin"

    beta: float
    gamma_beta_ratio: float
    length_normalize: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.beta > 0, f"beta must be positive, got {self.beta}")

    @property
    def gamma(self) -> float:
        return self.gamma_beta_ratio * self.beta

    @property
    def derived(self) -> dict[str, float]:
        return {"gamma": self.gamma}

    def scores(self, inputs: PairInputs) -> tuple[Tensor, Tensor]:
        chosen, rejected = inputs.policy_chosen_logps, inputs.policy_rejected_logps
        if self.length_normalize:
            chosen, rejected = chosen / inputs.chosen_lengths, rejected / inputs.rejected_lengths
        return self.beta * chosen, self.beta * rejected

    def losses(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> Tensor:
        return -logsigmoid(chosen - rejected - self.gamma)

    def diagnostics(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
        return {"saturation": saturated(chosen - rejected - self.gamma)}
