"""SimPO with a margin from the reference (Wu et al. 2024, alpha-DPO, arXiv 2410.10148)."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from prefopt.objectives.base import PairInputs, initial_moments, require, running_moments, saturated
from prefopt.objectives.simpo import SimPO


@dataclass(frozen=True)
class AlphaDPO(SimPO):
    """loss = -log sigma(beta (a_w - a_l) - gamma - beta alpha (g - m) / s),  a = lp / n,  g = u_w / n_w - u_l / n_l.

    SimPO whose target margin grows with what the pair has won over the reference already. g is detached; m and s are
    its running mean and standard deviation over the optimizer steps, updated before use, and saved with the checkpoint.
    They start at 0 and 1 (at 0 and 0 in the authors' code, which divides zero by zero at the first step). alpha 0 is
    SimPO. Defaults are the authors' for Llama-3-8B-Instruct (github.com/junkangwu/alpha-DPO), whose learning rates are
    6e-7 to 1e-6. `length_normalize=false` takes sums instead of a and g. Scores are beta * a.
    Raises ValueError for beta <= 0, alpha < 0 or momentum outside [0, 1).
    """

    equation = "−log σ(β(lp_w/n_w − lp_l/n_l) − γ − βα·z(g)), g = u_w/n_w − u_l/n_l, z by running moments"
    paper = "2410.10148"
    summary = "SimPO with a target margin for each pair, from how far it has moved from the reference"
    needs = frozenset({"reference"})
    scope = "step"

    alpha: float = 0.2
    momentum: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.alpha >= 0, f"alpha must not be negative, got {self.alpha}")
        require(0 <= self.momentum < 1, f"momentum must be in [0, 1), got {self.momentum}")

    def initial_state(self) -> dict[str, Tensor]:
        return initial_moments()

    def next_state(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
        return running_moments(inputs.state, self._gains(inputs), self.momentum)

    def _gains(self, inputs: PairInputs) -> Tensor:
        """g, `(B,)`, detached."""
        chosen, rejected = inputs.chosen_logratios.detach(), inputs.rejected_logratios.detach()
        if self.length_normalize:
            chosen, rejected = chosen / inputs.chosen_lengths, rejected / inputs.rejected_lengths
        return chosen - rejected

    def _logits(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> Tensor:
        gains = self._gains(inputs)
        moments = running_moments(inputs.state, gains, self.momentum)
        normalized = (gains - moments["mean"]) / moments["scale"].clamp(min=1e-12)
        return chosen - rejected - self.gamma - self.beta * self.alpha * normalized

    def losses(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> Tensor:
        return -logsigmoid(self._logits(inputs, chosen, rejected))

    def diagnostics(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
        return {"saturation": saturated(self._logits(inputs, chosen, rejected)), "gain": self._gains(inputs)}
