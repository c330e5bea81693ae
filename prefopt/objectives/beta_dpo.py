"""DPO with a beta per batch, after filtering (Wu et al. 2024, beta-DPO, arXiv 2407.08639)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefopt.objectives.base import ImplicitReward, PairInputs, initial_moments, require, running_moments, saturated


@dataclass(frozen=True)
class BetaDPO(ImplicitReward):
    """loss = -log sigma(beta_batch (u_w - u_l)) on the kept pairs of the optimizer step, 0 on the others.

    With M = beta (u_w - u_l), detached, and m, s its running mean and scale (`momentum`), updated before use:
    beta_batch = beta (1 + alpha (mean M - m)), not below 1e-3; int(keep * B) pairs, at least one, are drawn without
    replacement with probability proportional to exp(-((M - m) / s)^2 / 2). The losses of kept pairs are scaled up by
    B / kept, so the step's loss is the mean over them. m and s start at 0 and 1 and are saved with the checkpoint.

    (The authors' code takes M without beta, and its mean over the kept pairs.) Scores are beta u, with the base beta.
    Raises ValueError for beta <= 0, alpha < 0, keep outside (0, 1] or momentum outside [0, 1).
    """

    equation = "−log σ(β_batch(u_w − u_l)) on kept pairs, β_batch = β(1 + α(mean M − m)), M = β(u_w − u_l)"
    paper = "2407.08639"
    needs = frozenset({"reference", "noise"})
    scope = "step"

    alpha: float = 0.6
    keep: float = 0.8
    momentum: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.alpha >= 0, f"alpha must not be negative, got {self.alpha}")
        require(0 < self.keep <= 1, f"keep must be a share of the pairs in (0, 1], got {self.keep}")
        require(0 <= self.momentum < 1, f"momentum must be in [0, 1), got {self.momentum}")

    def initial_state(self) -> dict[str, Tensor]:
        return initial_moments()

    def next_state(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
        return running_moments(inputs.state, chosen - rejected, self.momentum)

    def batch(self, inputs: PairInputs, gaps: Tensor) -> tuple[Tensor, Tensor]:
        """beta_batch, 0-dim, and which pairs are kept, `(B,)` bool."""
        moments = running_moments(inputs.state, gaps, self.momentum)
        beta = (self.beta * (1 + self.alpha * (gaps.mean() - moments["mean"]))).clamp(min=1e-3)
        # The largest values of log weight + Gumbel noise are a draw without replacement in proportion to the weights.
        log_weights = -0.5 * ((gaps - moments["mean"]) / moments["scale"].clamp(min=1e-12)) ** 2
        gumbel = -torch.log(-torch.log(inputs.noise.clamp(1e-7, 1 - 1e-7)))
        kept = (log_weights + gumbel).topk(max(1, int(self.keep * len(gaps)))).indices
        return beta, torch.zeros_like(gaps, dtype=torch.bool).index_fill(0, kept, True)

    def losses(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> Tensor:
        gaps = chosen - rejected
        beta, kept = self.batch(inputs, gaps.detach())
        # The gaps contain the base beta. The step divides by all pairs, so the losses of the kept ones are scaled up.
        return torch.where(kept, -logsigmoid(beta / self.beta * gaps) * len(kept) / kept.sum(), 0.0)

    def diagnostics(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
        beta, kept = self.batch(inputs, chosen - rejected)
        moments = running_moments(inputs.state, chosen - rejected, self.momentum)
        saturation = saturated(beta / self.beta * (chosen - rejected))
        return {"saturation": saturation, "beta_batch": beta, "kept": kept} | {
            f"running_{name}": value for name, value in moments.items()
        }
