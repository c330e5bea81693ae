"""REINFORCE leave-one-out (Ahmadian et al. 2024, arXiv 2402.14740), with the clipped ratio of TRL's RLOOTrainer."""

from dataclasses import dataclass

import torch
from torch import Tensor

from prefopt.objectives.base import Need, clamped_exp, require
from prefopt.objectives.groupwise import GroupInputs, Groupwise


@dataclass(frozen=True)
class RLOO(Groupwise):
    """loss = mean_i -min(rho_i A_i, clip(rho_i, 1 - epsilon, 1 + epsilon) A_i) over the n responses to a prompt.

    A response is one action: rho = exp(lp - op), op its log-prob by the policy that has drawn it. Its reward is
    R = r - beta (op - rp), and its advantage A the difference between R and the mean of the others' R (Eq. 5 of the
    paper). As in TRL 1.16, which is followed here, the KL penalty is of the policy that has drawn the responses.
    At rho = 1 the gradient is the paper's, -mean A grad lp. rho beyond e^40 follows the tangent.

    Raises ValueError for beta < 0, and for epsilon outside (0, 1).
    """

    equation = (
        "mean over n of −min(ρA, clip(ρ, 1±ε)A), ρ = exp(lp − op), A = R − mean of the others' R, R = r − β(op − rp)"
    )
    paper = "2402.14740, Eq. 5"
    summary = "policy gradient with the other samples' mean reward as baseline; op: lp of the policy that drew them"
    made_for = frozenset({"online"})
    step0_loss = 0.0  # the advantages of a group add up to zero

    beta: float = 0.05
    epsilon: float = 0.2

    def __post_init__(self) -> None:
        require(self.beta >= 0, f"beta must not be negative, got {self.beta}")
        require(0 < self.epsilon < 1, f"epsilon must lie between 0 and 1, got {self.epsilon}")

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]
        return frozenset({"rewards", "initial", "reference"} if self.beta else {"rewards", "initial"})

    def advantages(self, group: GroupInputs) -> Tensor:
        """(B, n)."""
        rewards = group.rewards
        if self.beta:
            rewards = rewards - self.beta * (group.initial_logps - group.reference_logps)
        rewards = rewards.masked_fill(~group.mask, 0.0)
        others = (rewards.sum(1, keepdim=True) - rewards) / (group.sizes - 1)[:, None]
        return rewards - others

    def losses(self, group: GroupInputs) -> Tensor:
        ratios = clamped_exp(group.policy_logps - group.initial_logps)
        return group.mean(clipped(ratios, self.advantages(group), self.epsilon))

    def diagnostics(self, group: GroupInputs) -> dict[str, Tensor]:
        ratios = (group.policy_logps - group.initial_logps).exp()
        outside = is_clipped(ratios, self.advantages(group), self.epsilon)
        return {"clipped": group.mean(outside.to(ratios.dtype)), "reward": group.mean(group.rewards)}


def clipped(ratios: Tensor, advantages: Tensor, epsilon: float) -> Tensor:
    """PPO's loss -min(rho A, clip(rho, 1 - epsilon, 1 + epsilon) A) (arXiv 1707.06347, Eq. 7), of any shape."""
    return -torch.minimum(ratios * advantages, ratios.clamp(1 - epsilon, 1 + epsilon) * advantages)


def is_clipped(ratios: Tensor, advantages: Tensor, epsilon: float) -> Tensor:
    """Bool: where that loss has no gradient."""
    return ((ratios < 1 - epsilon) & (advantages < 0)) | ((ratios > 1 + epsilon) & (advantages > 0))
