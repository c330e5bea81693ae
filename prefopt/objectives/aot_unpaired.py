"""Alignment via optimal transport, unpaired (Melnyk et al. 2024, AOT, arXiv 2406.05882)."""

from dataclasses import dataclass

from torch import Tensor

from prefopt.objectives.aot import AOT, against_sorted
from prefopt.objectives.base import PairInputs


@dataclass(frozen=True)
class AOTUnpaired(AOT):
    """loss = -(1 - e) log sigma(beta d) - e log sigma(-beta d),  d = sort(u_w) - sort(u_l),  u = log pi - log pi_ref.

    As `aot`, of the chosen and the rejected log-ratios of the optimizer step, each sorted by itself: which chosen
    completion belongs to which rejected one plays no part. The formula follows TRL 1.16, which sorts within a
    micro-batch. Scores are beta * u. Raises ValueError for beta <= 0 or e outside [0, 0.5).
    """

    equation = "−(1−ε) log σ(βd) − ε log σ(−βd), d = sort(u_w) − sort(u_l) over the step"
    summary = "compares the distribution of the chosen log-ratios with that of the rejected ones, whatever the pairs"

    def gaps(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> Tensor:
        return against_sorted(chosen, rejected)
