"""Self-play preference optimization with hard labels (Wu et al. 2024, arXiv 2405.00675, Eq. 4.7)."""

from dataclasses import dataclass

from torch import Tensor

from prefopt.objectives.base import PairInputs, Pairwise, require


@dataclass(frozen=True)
class SPPO(Pairwise):
    """loss = (u_w - eta / 2)^2 + (u_l + eta / 2)^2,  eta = 1 / beta,  u = log pi - log pi_ref.

    The paper's square of u - eta (P(y beats the policy) - 1/2) with P = 1 for the chosen and 0 for the rejected
    completion, summed over the two as in public code (the authors' own halves it). Scores are u.
    Raises ValueError for beta <= 0.
    """

    equation = "(u_w − 1/(2β))² + (u_l + 1/(2β))², 1/β = η"
    paper = "2405.00675, Eq. 4.7"
    needs = frozenset({"reference"})

    beta: float

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.beta > 0, f"beta must be positive, got {self.beta}")

    @property
    def loss_at_reference(self) -> float:  # type: ignore[override]
        return 2 * (1 / (2 * self.beta)) ** 2

    @property
    def derived(self) -> dict[str, float]:
        return {"eta": 1 / self.beta}

    def scores(self, inputs: PairInputs) -> tuple[Tensor, Tensor]:
        return inputs.chosen_logratios, inputs.rejected_logratios

    def losses(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> Tensor:
        target = 1 / (2 * self.beta)  # eta / 2
        return (chosen - target) ** 2 + (rejected + target) ** 2
