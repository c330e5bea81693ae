"""Inverse perplexities without hyperparameters (Xiao et al. 2025, SimPER, arXiv 2502.00883)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from prefopt.objectives.base import PairInputs, Pairwise


@dataclass(frozen=True)
class SimPER(Pairwise):
    """loss = -exp(lp_w / n_w) + exp(lp_l / n_l): the inverse perplexities of the two sides; no reference, no beta.

    As the authors' code (github.com/tengxiao1/SimPER, simper_trainer.py), whose learning rates are 3e-7 to 1e-6. A side
    that is unlikely already hardly moves, since the gradient is the inverse perplexity itself. Scores are exp(lp / n).
    """

    equation = "−exp(lp_w/n_w) + exp(lp_l/n_l)"
    paper = "2502.00883"
    summary = "raises one inverse perplexity and lowers the other, without any hyperparameter"

    def scores(self, inputs: PairInputs) -> tuple[Tensor, Tensor]:
        return (
            torch.exp(inputs.policy_chosen_logps / inputs.chosen_lengths),
            torch.exp(inputs.policy_rejected_logps / inputs.rejected_lengths),
        )

    def losses(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> Tensor:
        return rejected - chosen
