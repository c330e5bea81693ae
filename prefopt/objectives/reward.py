"""A Bradley-Terry reward model (Ouyang et al. 2022, arXiv 2203.02155, Eq. 1)."""

import math
from dataclasses import dataclass

from torch.nn.functional import logsigmoid

from prefopt.objectives.base import Objective, ObjectiveOutput, PairInputs, saturated


@dataclass(frozen=True)
class Reward(Objective):
    """loss = -log sigma(r_w - r_l),  r the scalar head's output on a completion's last token. Scores are r.

    The head starts at zero, so the first loss is log 2.
    """

    equation = "−log σ(r_φ(x, y_w) − r_φ(x, y_l))"
    paper = "2203.02155, Eq. 1"
    model_kind = "reward_model"
    step0_loss = math.log(2)

    def __call__(self, inputs: PairInputs) -> ObjectiveOutput:
        chosen, rejected = inputs.policy_chosen_rewards, inputs.policy_rejected_rewards
        z = chosen - rejected
        return ObjectiveOutput(
            -logsigmoid(z), chosen.detach(), rejected.detach(), {"saturation": saturated(z.detach())}
        )
