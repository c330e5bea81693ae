"""Simple preference optimization (Meng et al. 2024, arXiv 2405.14734, Eq. 6)."""

from dataclasses import dataclass

from torch.nn.functional import logsigmoid

from prefopt.objectives.base import Objective, ObjectiveOutput, PairInputs, require


@dataclass(frozen=True)
class SimPO(Objective):
    """loss = -log sigma(beta (lp_w / n_w - lp_l / n_l) - gamma),  gamma = gamma_beta_ratio * beta; no reference.

    The paper tunes the ratio gamma / beta, so the ratio is what is configured. `length_normalize=false` takes sums
    instead of per-token means; the MMPO paper's published SimPO runs do so. Scores are beta * lp / n (or beta * lp).
    Raises ValueError for beta <= 0.
    """

    beta: float
    gamma_beta_ratio: float
    length_normalize: bool = True

    def __post_init__(self) -> None:
        require(self.beta > 0, f"beta must be positive, got {self.beta}")

    @property
    def gamma(self) -> float:
        return self.gamma_beta_ratio * self.beta

    def __call__(self, inputs: PairInputs) -> ObjectiveOutput:
        chosen, rejected = inputs.policy_chosen_logps, inputs.policy_rejected_logps
        if self.length_normalize:
            chosen, rejected = chosen / inputs.chosen_lengths, rejected / inputs.rejected_lengths
        chosen, rejected = self.beta * chosen, self.beta * rejected
        losses = -logsigmoid(chosen - rejected - self.gamma)
        return ObjectiveOutput(losses, chosen.detach(), rejected.detach())
