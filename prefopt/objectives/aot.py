"""Alignment via optimal transport, paired (Melnyk et al. 2024, AOT, arXiv 2406.05882)."""

import math
from dataclasses import dataclass

from torch import Tensor

from prefopt.objectives.base import ImplicitReward, PairInputs, require, saturated
from prefopt.objectives.margin_matching import cross_entropy


@dataclass(frozen=True)
class AOT(ImplicitReward):
    """loss = -(1 - e) log sigma(beta d) - e log sigma(-beta d),  d = sort(lp_w - lp_l) - sort(rp_w - rp_l).

    Both lists, of the policy's and of the reference's gaps, are sorted over all pairs of the optimizer step. The pair
    with the policy's k-th smallest gap is held against the reference's k-th smallest, so that the distribution of the
    policy's gaps comes to dominate the reference's. `label_smoothing` e as in cDPO. The formula follows TRL 1.16, which
    sorts within a micro-batch. Scores are beta * u. Raises ValueError for beta <= 0 or e outside [0, 0.5).
    """

    equation = "−(1−ε) log σ(βd) − ε log σ(−βd), d = sort(lp_w − lp_l) − sort(rp_w − rp_l) over the step"
    paper = "2406.05882"
    summary = "compares the distribution of the step's gaps with the reference's, and not pair with pair"
    scope = "step"
    loss_at_reference = math.log(2)

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.label_smoothing < 0.5, f"label_smoothing must be in [0, 0.5), got {self.label_smoothing}")

    def gaps(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> Tensor:
        """beta d of each pair, `(B,)`."""
        reference = self.beta * (inputs.reference_chosen_logps - inputs.reference_rejected_logps)
        return against_sorted(chosen - rejected + reference, reference)

    def losses(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> Tensor:
        return cross_entropy(self.gaps(inputs, chosen, rejected), 1 - self.label_smoothing)

    def diagnostics(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
        return {"saturation": saturated(self.gaps(inputs, chosen, rejected))}


def against_sorted(values: Tensor, others: Tensor) -> Tensor:
    """Each of `values` `(B,)` minus that one of `others` `(B,)` which has its rank: sort(values) - sort(others), in the
    order of `values`.

    >>> import torch
    >>> against_sorted(torch.tensor([5.0, 1.0, 3.0]), torch.tensor([0.0, 20.0, 10.0])).tolist()
    [-15.0, 1.0, -7.0]
    """
    ranks = values.argsort(stable=True).argsort()
    return values - others.sort(stable=True).values[ranks]
