"""Weighted preference optimization (Zhou et al. 2024, arXiv 2406.11827, Eq. 2 and 3)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from prefopt.objectives.base import PairInputs, require
from prefopt.objectives.dpo import DPO


@dataclass(frozen=True)
class WPO(DPO):
    """loss = sg[w_w w_l] * DPO's,  w = exp(mean_t (log pi(y_t) - log sum_v pi(v)^2)), sg: no gradient.

    A weight is high where a completion looks like the policy's own, so that off-policy data are learnt as if they were
    on-policy. The product of two is at most `max_weight`: the authors' code has 1, and TRL none (null). Label smoothing
    and scores are DPO's; the likelihood term of `nll_weight` has no such weight. Raises ValueError where DPO does, and
    for max_weight <= 0.
    """

    equation = "min(w_w w_l, m) · (−log σ(β(u_w − u_l))), w = exp(mean(lp_t − log Σ_v p_v²)) without gradient"
    paper = "2406.11827, Eq. 3"
    summary = "DPO that counts a pair as much as its completions look like the policy's own"
    needs = frozenset({"reference", "on_policy"})
    loss_at_reference: ClassVar[float | None] = None  # type: ignore[assignment]  # the weights depend on the data

    max_weight: float | None = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.max_weight is None or self.max_weight > 0, f"max_weight must be positive, got {self.max_weight}")

    def _weights(self, inputs: PairInputs) -> Tensor:
        weights = (inputs.chosen_on_policy + inputs.rejected_on_policy).detach().exp()
        return weights if self.max_weight is None else weights.clamp(max=self.max_weight)

    def losses(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> Tensor:
        return self._weights(inputs) * super().losses(inputs, chosen, rejected)

    def diagnostics(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
        return super().diagnostics(inputs, chosen, rejected) | {"weight": self._weights(inputs)}
