"""DPO with a beta per batch, after filtering (Wu et al. 2024, beta-DPO, arXiv 2407.08639)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefopt.objectives.base import ImplicitReward, PairInputs, initial_moments, require, running_moments, saturated


@dataclass(frozen=True)
class BetaDPO(ImplicitReward):
    """loss = -log sigma(beta_batch (u_w - u_l)) on the kept pairs of the optimizer step, 0 on the others.

    beta_batch = beta (1 + alpha (mean M - m)), not below 1e-3, with M the detached margins of the pairs and m, s their
    running mean and standard deviation (`momentum`), updated before use; int(keep * B) pairs, at least one, are drawn
    without replacement with probability proportional to exp(-((M - m) / s)^2 / 2). The losses of kept pairs are scaled
    up by B / kept, so the step's loss is the mean over them. m, s and the draw follow M, whichever it is:

    * `margin_of=log_ratio`: M = u_w - u_l, and mean M is that of the kept pairs. This is the authors' code
      (github.com/junkangwu/beta-DPO, trainers.py), whose alpha is 0.6. It is the default, since it is what somebody
      who knows beta-DPO's settings means by its name.
    * `margin_of=reward`: M = beta (u_w - u_l), the implicit reward's margin, and mean M is that of all pairs. This is
      the paper's formula and the baseline of MADPO's experiment (arXiv 2510.05342). The same alpha acts 1 / beta times
      weaker.

    The draw depends on M / s, in which beta cancels as soon as m and s have forgotten where they started. They start at
    0 and 1 (at 0 and 0 in the authors' code, which divides zero by zero while policy and reference are equal), and are
    saved with the checkpoint. Scores are beta u, with the base beta. Raises ValueError for beta <= 0, alpha < 0, keep
    outside (0, 1], momentum outside [0, 1) or another margin_of.
    """

    equation = "−log σ(β_batch(u_w − u_l)) on kept pairs, β_batch = β(1 + α(mean M − m)), M = u_w − u_l or β(u_w − u_l)"
    paper = "2407.08639"
    summary = "DPO whose beta follows the gaps of the step, and which leaves out odd pairs"
    made_for = frozenset({"noisy_labels"})
    needs = frozenset({"reference", "noise"})
    scope = "step"

    margin_of: str = "log_ratio"
    alpha: float = 0.6
    keep: float = 0.8
    momentum: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.margin_of in ("log_ratio", "reward"),
            f"margin_of must be log_ratio or reward, got {self.margin_of!r}",
        )
        require(self.alpha >= 0, f"alpha must not be negative, got {self.alpha}")
        require(0 < self.keep <= 1, f"keep must be a share of the pairs in (0, 1], got {self.keep}")
        require(0 <= self.momentum < 1, f"momentum must be in [0, 1), got {self.momentum}")

    def initial_state(self) -> dict[str, Tensor]:
        return initial_moments()

    def next_state(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
        return running_moments(inputs.state, self.margins(chosen, rejected), self.momentum)

    def margins(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """M, `(B,)`, detached. The two terms contain beta."""
        margins = (chosen - rejected).detach()
        return margins / self.beta if self.margin_of == "log_ratio" else margins

    def batch(self, inputs: PairInputs, margins: Tensor) -> tuple[Tensor, Tensor]:
        """beta_batch, 0-dim, and which pairs are kept, `(B,)` bool."""
        moments = running_moments(inputs.state, margins, self.momentum)
        # The largest values of log weight + Gumbel noise are a draw without replacement in proportion to the weights.
        log_weights = -0.5 * ((margins - moments["mean"]) / moments["scale"].clamp(min=1e-12)) ** 2
        gumbel = -torch.log(-torch.log(inputs.noise.clamp(1e-7, 1 - 1e-7)))
        kept = (log_weights + gumbel).topk(max(1, int(self.keep * len(margins)))).indices
        mean = margins[kept].mean() if self.margin_of == "log_ratio" else margins.mean()
        beta = (self.beta * (1 + self.alpha * (mean - moments["mean"]))).clamp(min=1e-3)
        return beta, torch.zeros_like(margins, dtype=torch.bool).index_fill(0, kept, True)

    def losses(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> Tensor:
        beta, kept = self.batch(inputs, self.margins(chosen, rejected))
        # The terms contain the base beta. The step divides by all pairs, so the losses of the kept ones are scaled up.
        losses = -logsigmoid(beta / self.beta * (chosen - rejected))
        return torch.where(kept, losses * len(kept) / kept.sum(), 0.0)

    def diagnostics(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
        beta, kept = self.batch(inputs, self.margins(chosen, rejected))
        saturation = saturated(beta / self.beta * (chosen - rejected))
        return {"saturation": saturation, "beta_batch": beta, "kept": kept} | {
            f"running_{name}": value for name, value in self.next_state(inputs, chosen, rejected).items()
        }
