"""Maximum marginal likelihood preference optimization (Najafi and Fyshe 2025, arXiv 2510.22881, section 3)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefopt.objectives.base import Need, PairInputs, Pairwise, Scope, require, saturated


@dataclass(frozen=True)
class MMPO(Pairwise):
    """loss = -logsumexp(s_w, s_l) - a log sigma(s_w - s_l),  s = lp + q,  q_w = margin + beta rp_w,  q_l = beta rp_l.

    rp is the reference's log-probability. q is min-max normalized over the 2B rewards of the micro-batch
    (`normalization=micro_batch`, as published), so the loss of a pair depends on its neighbours, and B, the
    `micro_batch_size`, is a hyperparameter of that normalization alone (2 in the paper); over the whole optimizer step
    (`step`); or not (`none`).
    No gradient flows through q. Scores are s.

    At a = 1 the two terms add up to -s_w exactly, since log sigma(s_w - s_l) = s_w - logsumexp(s_w, s_l). The gradient
    is then that of maximum likelihood on the chosen completion: beta, margin and normalization shift the loss, and
    move no weight. (The published win rates hardly differ between values of beta either.)

    The paper's ablations (section 5) are switches:
    * `length_normalize`: lp / n and rp / n instead of sums;
    * `entropy_bonus`: loss -= beta H, H the mean of the chosen and the rejected completion's entropy surrogates (over
      n with `length_normalize`; appendix B.2, which takes the mean over the 2B completions);
    * `auxiliary_weight=0`: without the term a log sigma(s_w - s_l);
    * `normalization=none`: q as it is.

    Raises ValueError for beta < 0, a < 0, another normalization, or an empty micro-batch.
    """

    equation = (
        "−logsumexp(s_w, s_l) − a log σ(s_w − s_l), s = lp + q, q = β rp (+ margin if chosen), min-max normalized"
    )
    paper = "2510.22881, section 3"
    summary = "raises the marginal likelihood of both completions, weighted by their rewards"

    beta: float
    margin: float = 0.9
    auxiliary_weight: float = 1.0
    normalization: str = "micro_batch"
    length_normalize: bool = False
    entropy_bonus: bool = False
    micro_batch_size: int = 2  # type: ignore[misc]  # of the class attribute an instance's

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.beta >= 0, f"beta must not be negative, got {self.beta}")
        require(self.auxiliary_weight >= 0, f"auxiliary_weight must not be negative, got {self.auxiliary_weight}")
        require(self.micro_batch_size >= 1, f"micro_batch_size must be at least 1, got {self.micro_batch_size}")
        require(
            self.normalization in ("micro_batch", "step", "none"),
            f"normalization must be micro_batch, step or none, got {self.normalization!r}",
        )

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]
        return frozenset({"reference", "entropies"} if self.entropy_bonus else {"reference"})

    @property
    def scope(self) -> Scope:  # type: ignore[override]
        # Minimum and maximum are taken over these pairs.
        return {"micro_batch": "micro_batch", "step": "step", "none": "pair"}[self.normalization]  # type: ignore[return-value]

    def _rewards(self, inputs: PairInputs) -> tuple[Tensor, Tensor]:
        """q of both sides, `(B,)` each."""
        chosen_n, rejected_n = self._tokens(inputs)
        chosen = self.margin + self.beta * inputs.reference_chosen_logps / chosen_n
        rejected = self.beta * inputs.reference_rejected_logps / rejected_n
        q = torch.stack([chosen, rejected]).detach()
        if self.normalization != "none":
            # As published: 1e-6 in both places, so that q stays positive and equal rewards do not divide by zero.
            q = (q - q.min() + 1e-6) / (q.max() - q.min() + 1e-6)
        return q[0], q[1]

    def _tokens(self, inputs: PairInputs) -> tuple[Tensor | int, Tensor | int]:
        return (inputs.chosen_lengths, inputs.rejected_lengths) if self.length_normalize else (1, 1)

    def scores(self, inputs: PairInputs) -> tuple[Tensor, Tensor]:
        chosen_n, rejected_n = self._tokens(inputs)
        chosen, rejected = self._rewards(inputs)
        return inputs.policy_chosen_logps / chosen_n + chosen, inputs.policy_rejected_logps / rejected_n + rejected

    def losses(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> Tensor:
        losses = -torch.logaddexp(chosen, rejected) - self.auxiliary_weight * logsigmoid(chosen - rejected)
        if self.entropy_bonus:
            chosen_n, rejected_n = self._tokens(inputs)
            entropies = inputs.chosen_entropies / chosen_n + inputs.rejected_entropies / rejected_n
            losses = losses - self.beta * entropies / 2
        return losses

    def diagnostics(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
        chosen_reward, rejected_reward = self._rewards(inputs)
        return {
            "saturation": saturated(chosen - rejected),
            "chosen_reward": chosen_reward,
            "rejected_reward": rejected_reward,
        }
