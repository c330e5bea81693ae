"""Identity preference optimization (Azar et al. 2023, arXiv 2310.12036, Eq. 17)."""

from dataclasses import dataclass

from torch import Tensor

from prefopt.objectives.base import PairInputs, Pairwise, require


@dataclass(frozen=True)
class IPO(Pairwise):
    """loss = (s_w - s_l - 1 / (2 beta))^2,  s = u = log pi - log pi_ref;  the paper calls beta tau.

    The paper writes the log-probability of a whole completion, hence sums. `length_normalize=true` takes s = u / n, as
    its authors advised and as TRL does; beta then has another meaning, because the target 1 / (2 beta) is a gap per
    token. Scores are s. Raises ValueError for beta <= 0.
    """

    equation = "(u_w − u_l − 1/(2β))²; or u/n instead of u"
    paper = "2310.12036, Eq. 17"
    summary = "a squared loss with a target gap, so that clear preferences do not drive the policy away"
    needs = frozenset({"reference"})

    beta: float
    length_normalize: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.beta > 0, f"beta must be positive, got {self.beta}")

    @property
    def loss_at_reference(self) -> float:  # type: ignore[override]
        return (1 / (2 * self.beta)) ** 2

    @property
    def derived(self) -> dict[str, float]:
        return {"target_gap": 1 / (2 * self.beta)}

    def scores(self, inputs: PairInputs) -> tuple[Tensor, Tensor]:
        chosen, rejected = inputs.chosen_logratios, inputs.rejected_logratios
        if self.length_normalize:
            chosen, rejected = chosen / inputs.chosen_lengths, rejected / inputs.rejected_lengths
        return chosen, rejected

    def losses(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> Tensor:
        return (chosen - rejected - 1 / (2 * self.beta)) ** 2

    def diagnostics(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
        return {"past_target": chosen - rejected > 1 / (2 * self.beta)}
