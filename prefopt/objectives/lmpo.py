"""Length-controlled margin-based preference optimization (Li et al. 2025, arXiv 2502.14643)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefopt.objectives.base import PairInputs, Pairwise, initial_moments, require, running_moments, saturated


@dataclass(frozen=True)
class LMPO(Pairwise):
    """loss = -log sigma(beta (a_w - a_l) - beta home_ratio - margin_weight (m - mean) / scale),  a = lp / n.

    m = (1 - p_w) (1 - (p_w - p_l)^5) / 2 with p = exp(a (n_w + n_l) / (2 n)), detached; its running mean and scale are
    taken over the optimizer steps, updated before use, start at 0 and 1, and are saved with the checkpoint.
    `home_ratio` * beta is the constant h (the home advantage), `margin_weight` the paper's lambda; no reference. The
    form of m follows the authors' code (github.com/gengxuli/LMPO). Scores are beta * a. Raises ValueError for
    beta <= 0, margin_weight < 0 or momentum outside [0, 1).
    """

    equation = "−log σ(β(lp_w/n_w − lp_l/n_l) − h − λ·z(m)), m = (1−p_w)(1−(p_w−p_l)⁵)/2, z by running moments"
    paper = "2502.14643"
    summary = "SimPO with a margin that controls length"
    scope = "step"

    beta: float
    home_ratio: float = 0.5
    margin_weight: float = 0.2
    momentum: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.beta > 0, f"beta must be positive, got {self.beta}")
        require(self.margin_weight >= 0, f"margin_weight must not be negative, got {self.margin_weight}")
        require(0 <= self.momentum < 1, f"momentum must be in [0, 1), got {self.momentum}")

    @property
    def derived(self) -> dict[str, float]:
        return {"home_advantage": self.home_ratio * self.beta}

    def initial_state(self) -> dict[str, Tensor]:
        return initial_moments()

    def next_state(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
        return running_moments(inputs.state, self._margins(inputs), self.momentum)

    def _margins(self, inputs: PairInputs) -> Tensor:
        """m, `(B,)`, detached."""
        n_chosen, n_rejected = inputs.chosen_lengths, inputs.rejected_lengths
        # Both completions as if they had the pair's mean length, so that length alone makes no margin.
        n = (n_chosen + n_rejected) / 2
        p_chosen = torch.exp(inputs.policy_chosen_logps.detach() / n_chosen * n / n_chosen)
        p_rejected = torch.exp(inputs.policy_rejected_logps.detach() / n_rejected * n / n_rejected)
        return (1 - p_chosen) * (1 - (p_chosen - p_rejected) ** 5) / 2

    def _logits(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> Tensor:
        margins = self._margins(inputs)
        moments = running_moments(inputs.state, margins, self.momentum)
        normalized = (margins - moments["mean"]) / moments["scale"].clamp(min=1e-12)
        return chosen - rejected - self.home_ratio * self.beta - self.margin_weight * normalized

    def scores(self, inputs: PairInputs) -> tuple[Tensor, Tensor]:
        return (
            self.beta * inputs.policy_chosen_logps / inputs.chosen_lengths,
            self.beta * inputs.policy_rejected_logps / inputs.rejected_lengths,
        )

    def losses(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> Tensor:
        return -logsigmoid(self._logits(inputs, chosen, rejected))

    def diagnostics(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
        saturation = saturated(self._logits(inputs, chosen, rejected))
        return {"saturation": saturation, "margin": self._margins(inputs)}
