"""DPO with other divergences than the reverse KL (Wang et al. 2023, f-DPO, arXiv 2309.16240)."""

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from prefopt.objectives.base import PairInputs, Pairwise, clamped_exp, require, saturated


@dataclass(frozen=True)
class FDPO(Pairwise):
    """loss = -log sigma(beta f'(t_w) - beta f'(t_l)),  t = pi / pi_ref of the whole completion, u = log t.

    `divergence`, up to constants that cancel:
    * `reverse_kl`: f' = u, which is DPO;
    * `forward_kl`: f' = -exp(-u);
    * `js` (Jensen-Shannon): f' = log(2 t / (1 + t)) = log 2 + log sigma(u);
    * `alpha`: f' = (1 - exp(-alpha u)) / alpha with 0 < alpha < 1.

    Exponents beyond 40 nats follow the tangent. Scores are beta f'. Raises ValueError for beta <= 0, another
    divergence, alpha outside (0, 1), or alpha without `divergence=alpha`.
    """

    equation = "−log σ(β f′(t_w) − β f′(t_l)), t = π/π_ref; f′: u | −1/t | log 2t/(1+t) | (1 − t^−α)/α"
    paper = "2309.16240"
    summary = "DPO with another divergence to the reference than the reverse KL"
    needs = frozenset({"reference"})
    loss_at_reference = math.log(2)

    beta: float
    divergence: str = "js"
    alpha: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.beta > 0, f"beta must be positive, got {self.beta}")
        known = ("reverse_kl", "forward_kl", "js", "alpha")
        require(self.divergence in known, f"divergence must be one of {', '.join(known)}, got {self.divergence!r}")
        if self.divergence == "alpha":
            require(self.alpha is not None and 0 < self.alpha < 1, f"alpha must be between 0 and 1, got {self.alpha}")
        else:
            require(self.alpha is None, f"alpha must be null unless divergence=alpha, got {self.alpha}")

    def _derivative(self, u: Tensor) -> Tensor:
        """f', up to a constant: only the difference of two values enters the loss. `u`: log-ratios."""
        if self.divergence == "reverse_kl":
            return u
        if self.divergence == "forward_kl":
            return -clamped_exp(-u)
        if self.divergence == "js":
            return math.log(2) + logsigmoid(u)
        assert self.alpha is not None
        return (1 - clamped_exp(-self.alpha * u)) / self.alpha

    def scores(self, inputs: PairInputs) -> tuple[Tensor, Tensor]:
        return (
            self.beta * self._derivative(inputs.chosen_logratios),
            self.beta * self._derivative(inputs.rejected_logratios),
        )

    def losses(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> Tensor:
        return -logsigmoid(chosen - rejected)

    def diagnostics(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
        return {"saturation": saturated(chosen - rejected)}
