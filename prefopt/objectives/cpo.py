"""Contrastive preference optimization (Xu et al. 2024, arXiv 2401.08417; 2507.21183, Eq. 15)."""

from dataclasses import dataclass, field

from torch import Tensor
from torch.nn.functional import logsigmoid

from prefopt.objectives.base import PairInputs, Pairwise, require, saturated


@dataclass(frozen=True)
class CPO(Pairwise):
    """loss = -log sigma(beta (lp_w - lp_l)) - nll_weight lp_w;  no reference.

    The likelihood term is part of this objective, and `nll_weight` is the papers' lambda. The defaults, lambda 0.2 on
    the sum of each pair (`nll_per=pair`), are the formula of both papers with the value of arXiv 2507.21183, Eq. 15,
    where CPO is a base of MaPPO. The CPO authors' code (github.com/fe1ixxu/ALMA, and TRL after it) takes lambda 1 on
    the mean over all chosen tokens: `nll_weight=1 nll_per=chosen_token`. The same lambda weighs there as many times
    less as a completion has tokens. Scores are beta * lp. Raises ValueError for beta <= 0.
    """

    equation = "−log σ(β(lp_w − lp_l)) − λ lp_w, λ = nll_weight"
    paper = "2401.08417; 2507.21183, Eq. 15"
    summary = "DPO without a reference, plus the likelihood of the chosen completion"

    beta: float
    nll_weight: float = field(default=0.2, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.beta > 0, f"beta must be positive, got {self.beta}")

    def scores(self, inputs: PairInputs) -> tuple[Tensor, Tensor]:
        return self.beta * inputs.policy_chosen_logps, self.beta * inputs.policy_rejected_logps

    def losses(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> Tensor:
        return -logsigmoid(chosen - rejected)

    def diagnostics(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
        return {"saturation": saturated(chosen - rejected)}
