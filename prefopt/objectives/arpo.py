"""Adaptive rejection preference optimization (Xu et al. 2024, X-ALMA, arXiv 2410.03115): for any pairwise objective."""

from dataclasses import dataclass

import torch
from torch import Tensor

from prefopt.objectives.base import PairInputs, require
from prefopt.objectives.plug_in import PlugIn


@dataclass(frozen=True)
class ARPO(PlugIn):
    """The base with its rejected term times min(strength exp(slope d) - 1, 1),  d = |lp_w / n_w - lp_l / n_l|.

    The rejected completion is pushed down less the more it resembles the chosen one, as good translations do; at d = 0
    the factor is -0.1, as in the authors' code (github.com/fe1ixxu/ALMA, cpo_trainer.py), from which form and defaults
    are. There the base is CPO with `nll_weight=1 nll_per=chosen_token`. The factor carries no gradient here; in that
    code it carries one. Scores are the base's. Raises ValueError unless strength and slope are positive.
    """

    equation = "the base's loss with min(η₁ e^(η₂|lp_w/n_w − lp_l/n_l|) − 1, 1) times its rejected term"
    paper = "2410.03115"
    summary = "any pairwise objective, in which a rejected completion close to the chosen one is pushed down less"
    scale_name = "rejection"

    strength: float = 0.9
    slope: float = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.strength > 0, f"strength must be positive, got {self.strength}")
        require(self.slope > 0, f"slope must be positive, got {self.slope}")

    def scale(self, inputs: PairInputs) -> Tensor:
        chosen = inputs.policy_chosen_logps / inputs.chosen_lengths
        rejected = inputs.policy_rejected_logps / inputs.rejected_lengths
        return (self.strength * torch.exp(self.slope * (chosen - rejected).detach().abs()) - 1).clamp(max=1)
