"""Margin-adaptive direct preference optimization (arXiv 2510.05342)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefopt.objectives.base import ImplicitReward, PairInputs, require


@dataclass(frozen=True)
class MADPO(ImplicitReward):
    """loss = w(h) * -log sigma(beta (u_w - u_l)),  h = r_w - r_l the reward model's margin (it may be negative).

        c(h) = c_min + (c_max - c_min) / (1 + (c_max - 1) / (1 - c_min) exp(decay (|h| - tau)))     c(tau) = 1
        w(h) = sigma(c(h) h) / sigma(h)  where h > -tau,  else 1

    Right pairs within tau count more than in DPO (amplification, c > 1), those beyond it less (damping, c < 1); `only`
    one of the two leaves the other pairs as they are in DPO. The rewards are raw outputs of a Bradley-Terry reward
    model (log-odds), not probabilities. `c_min` null is 1 / c_max; `decay` is the paper's lambda. Scores are beta * u.
    Raises ValueError for beta <= 0, c_max <= 1, c_min outside (0, 1), decay <= 0, tau <= 0, or another `only`.
    """

    equation = "w(h) · (−log σ(β(u_w − u_l))), w(h) = σ(c(h)h)/σ(h) if h > −τ else 1, h = r_w − r_l"
    paper = "2510.05342"
    summary = "DPO with a weight for each pair from a reward model's margin"
    needs = frozenset({"reference", "rewards"})

    c_max: float = 2.0
    c_min: float | None = None
    decay: float = 1.0
    tau: float = math.log(0.999 / 0.001)
    only: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.c_max > 1, f"c_max must be above 1, got {self.c_max}")
        require(0 < self._c_min < 1, f"c_min must be between 0 and 1, got {self.c_min}")
        require(self.decay > 0, f"decay must be positive, got {self.decay}")
        require(self.tau > 0, f"tau must be positive, got {self.tau}")
        require(
            self.only in (None, "amplification", "damping"),
            f"only must be amplification, damping or null, got {self.only!r}",
        )

    @property
    def _c_min(self) -> float:
        return 1 / self.c_max if self.c_min is None else self.c_min

    def coefficients(self, h: Tensor) -> Tensor:
        """c(h), `(B,)`."""
        # The fraction of c(h) as a sigmoid, which cannot overflow for a large |h|.
        ratio = math.log((self.c_max - 1) / (1 - self._c_min))
        c = self._c_min + (self.c_max - self._c_min) * torch.sigmoid(-ratio - self.decay * (h.abs() - self.tau))
        if self.only is None:
            return c
        return c.clamp(min=1) if self.only == "amplification" else c.clamp(max=1)

    def weights(self, h: Tensor) -> Tensor:
        """w(h), `(B,)`."""
        # A difference of logarithms: for a very negative h both sigmoids are 0 in float32.
        weights = (logsigmoid(self.coefficients(h) * h) - logsigmoid(h)).exp()
        return torch.where(h > -self.tau, weights, 1.0)

    def losses(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> Tensor:
        return self.weights(inputs.chosen_rewards - inputs.rejected_rewards) * -logsigmoid(chosen - rejected)

    def diagnostics(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
        h = inputs.chosen_rewards - inputs.rejected_rewards
        return super().diagnostics(inputs, chosen, rejected) | {"weight": self.weights(h), "reward_margin": h}
