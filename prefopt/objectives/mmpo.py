"""Maximum marginal likelihood preference optimization (arXiv 2510.22881, section 3)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefopt.objectives.base import Need, Objective, ObjectiveOutput, PairInputs, Scope, require


@dataclass(frozen=True)
class MMPO(Objective):
    """loss = -logsumexp(s_w, s_l) - a log sigma(s_w - s_l),  s = lp + q,  q_w = margin + beta rp_w,  q_l = beta rp_l.

    rp is the reference's log-probability. With `normalize_rewards`, q is min-max normalized over the 2B rewards of
    the micro-batch (B pairs per device, 2 in the paper): the loss of a pair then depends on its micro-batch, which
    is why the scope says so. No gradient flows through q. Scores are s.

    At a = 1 the two terms add up to -s_w exactly, since log sigma(s_w - s_l) = s_w - logsumexp(s_w, s_l). The gradient
    is then that of maximum likelihood on the chosen completion: beta, margin and normalization shift the loss, and
    move no weight. (The published win rates hardly differ between values of beta either.)

    The paper's ablations (section 5) are the four switches:
    * `length_normalize`: lp / n and rp / n instead of sums;
    * `entropy_bonus`: loss -= beta H, H the sum of the chosen and the rejected completion's entropy surrogates (over
      n with `length_normalize`; appendix B.2);
    * `auxiliary_weight: 0`: without the term a log sigma(s_w - s_l);
    * `normalize_rewards: false`: q as it is.

    Raises ValueError for beta < 0 or a < 0.
    """

    beta: float
    margin: float = 0.9
    auxiliary_weight: float = 1.0
    normalize_rewards: bool = True
    length_normalize: bool = False
    entropy_bonus: bool = False

    def __post_init__(self) -> None:
        require(self.beta >= 0, f"beta must not be negative, got {self.beta}")
        require(self.auxiliary_weight >= 0, f"auxiliary_weight must not be negative, got {self.auxiliary_weight}")

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]
        return frozenset({"reference", "entropies"} if self.entropy_bonus else {"reference"})

    @property
    def scope(self) -> Scope:  # type: ignore[override]
        return "micro_batch" if self.normalize_rewards else "pair"

    def _marginal_rewards(self, reference_chosen: Tensor, reference_rejected: Tensor) -> tuple[Tensor, Tensor]:
        """q of both sides, `(B,)` each; min-max normalized over all 2B of them where asked for."""
        q = torch.stack([self.margin + self.beta * reference_chosen, self.beta * reference_rejected]).detach()
        if self.normalize_rewards:
            q = (q - q.min() + 1e-6) / (q.max() - q.min() + 1e-6)
        return q[0], q[1]

    def __call__(self, inputs: PairInputs) -> ObjectiveOutput:
        chosen_n = inputs.chosen_lengths if self.length_normalize else 1
        rejected_n = inputs.rejected_lengths if self.length_normalize else 1
        q_chosen, q_rejected = self._marginal_rewards(
            inputs.reference_chosen_logps / chosen_n, inputs.reference_rejected_logps / rejected_n
        )
        chosen = inputs.policy_chosen_logps / chosen_n + q_chosen
        rejected = inputs.policy_rejected_logps / rejected_n + q_rejected
        losses = -torch.logaddexp(chosen, rejected) - self.auxiliary_weight * logsigmoid(chosen - rejected)
        if self.entropy_bonus:
            entropies = inputs.chosen_entropies / chosen_n + inputs.rejected_entropies / rejected_n
            losses = losses - self.beta * entropies
        return ObjectiveOutput(losses, chosen.detach(), rejected.detach())
