"""Noise contrastive alignment on pairs (Chen et al. 2024, NCA, arXiv 2402.05369)."""

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from prefopt.objectives.base import ImplicitReward, PairInputs, saturated


@dataclass(frozen=True)
class NCA(ImplicitReward):
    """loss = -log sigma(s_w) - (log sigma(-s_w) + log sigma(-s_l)) / 2,  s = beta u.

    It fits the value of each completion and not their difference alone, so that the chosen one does not become less
    likely together with the rejected one. In beta u_w the loss is lowest at log 2: a bound that DPO does not have. The
    same paper's InfoNCA is DPO on pairs. beta is 0.01 in the authors' settings
    (github.com/thu-ml/Noise-Contrastive-Alignment), whose 5e-6 for a QLoRA is the learning rate of an adapter. Scores
    are s. Raises ValueError for beta <= 0.
    """

    equation = "−log σ(β u_w) − ½ log σ(−β u_w) − ½ log σ(−β u_l)"
    paper = "2402.05369"
    summary = "fits each completion's own value, so that the chosen one does not fall along with the rejected one"
    learning_rates = (1e-6, 5e-6)
    loss_at_reference = 2 * math.log(2)

    def losses(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> Tensor:
        return -logsigmoid(chosen) - (logsigmoid(-chosen) + logsigmoid(-rejected)) / 2

    def diagnostics(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
        return {"chosen_saturation": saturated(chosen), "rejected_saturation": saturated(rejected)}
