"""Step-level value preference optimization without its tree search (Chen et al. 2024, SVPO, arXiv 2406.10858)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import relu

from prefopt.objectives.base import PairInputs, require
from prefopt.objectives.dpo import DPO


@dataclass(frozen=True)
class SVPO(DPO):
    """DPO on next steps, with a value head that learns what the steps are worth.

    loss = DPO's + c ((V_w - Q_w)^2 + (V_l - Q_l)^2 + max(0, m - (V_w - V_l))),  c = `value_weight`, m = `margin`.

    V in (-1, 1) is the value head's output at a step's last token, and Q the prior reward of the step: its value in the
    paper's tree search, where 1 is a right solution and -1 a wrong one. The search is not here, and rows bring Q. The
    head shares the policy's hidden states, and is not exported with it. Scores and label smoothing are DPO's.

    The two terms of the value are the paper's as excerpts tell; its weights for them and its margin could not be read,
    and its training code is not public. tanh is that of the authors' AlphaMath. Raises ValueError where DPO does, and
    for value_weight < 0 or margin < 0.
    """

    equation = "DPO’s + c((V_w − r_w)² + (V_l − r_l)² + max(0, m − (V_w − V_l))), V of the value head"
    paper = "2406.10858, without the search"
    summary = "DPO on steps with a value head beside the policy, which learns the steps' q values"
    needs = frozenset({"reference", "rewards", "values"})
    reward_range = (-1.0, 1.0)
    loss_at_reference: ClassVar[float | None] = None  # type: ignore[assignment]  # q values differ between pairs

    value_weight: float = 1.0
    margin: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.value_weight >= 0, f"value_weight must not be negative, got {self.value_weight}")
        require(self.margin >= 0, f"margin must not be negative, got {self.margin}")

    def losses(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> Tensor:
        errors = (inputs.policy_chosen_values - inputs.chosen_rewards) ** 2
        errors = errors + (inputs.policy_rejected_values - inputs.rejected_rewards) ** 2
        ranking = relu(self.margin - (inputs.policy_chosen_values - inputs.policy_rejected_values))
        return super().losses(inputs, chosen, rejected) + self.value_weight * (errors + ranking)

    def diagnostics(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
        values = inputs.policy_chosen_values.detach(), inputs.policy_rejected_values.detach()
        errors = (values[0] - inputs.chosen_rewards).abs() + (values[1] - inputs.rejected_rewards).abs()
        of_values = {"value_accuracy": values[0] > values[1], "value_error": errors / 2}
        return super().diagnostics(inputs, chosen, rejected) | of_values
