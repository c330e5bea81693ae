"""DPO with a length penalty (Park et al. 2024, R-DPO, arXiv 2403.19159)."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from prefopt.objectives.base import ImplicitReward, PairInputs, require, saturated


@dataclass(frozen=True)
class RDPO(ImplicitReward):
    """loss = -log sigma(beta (u_w - u_l) + alpha (n_w - n_l)),  n the number of tokens.

    The policy that maximizes E[r - alpha n] - beta KL has r = beta u + alpha n up to a constant of the prompt. With
    this r in the Bradley-Terry model the loss follows, and its sign. A pair whose chosen completion is the longer one
    is so taken for settled in part, and pushes less. The paper itself was not at hand; a summary has this sign. The
    repository of alpha-DPO (github.com/junkangwu/alpha-DPO) subtracts the term, which rewards length instead. alpha 0
    is DPO. Scores are beta * u. Raises ValueError for beta <= 0 or alpha < 0.
    """

    equation = "−log σ(β(u_w − u_l) + α(n_w − n_l))"
    paper = "2403.19159"
    summary = "DPO that does not learn to write longer: a token of difference in length counts alpha of reward"

    alpha: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.alpha >= 0, f"alpha must not be negative, got {self.alpha}")

    def _logits(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> Tensor:
        return chosen - rejected + self.alpha * (inputs.chosen_lengths - inputs.rejected_lengths)

    def losses(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> Tensor:
        return -logsigmoid(self._logits(inputs, chosen, rejected))

    def diagnostics(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
        return {"saturation": saturated(self._logits(inputs, chosen, rejected))}
