"""Maximum marginal likelihood preference optimization (Najafi and Fyshe 2025, arXiv 2510.22881, section 3)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefopt.objectives import GROUP, SIDES
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

    With `candidates=group` the marginal likelihood is over n samples of a prompt, -logsumexp_i(s_i) (Eq. 4), as the
    paper has it before it takes the pair as its samples. The margin is on the best of them, and q is min-max normalized
    over the group (`normalization=group`) or not. The auxiliary term compares two completions, so it must be 0, and the
    entropies are those of two. Of n samples only Eq. 4 is known here, from excerpts; nothing published trains with it.

    The paper's ablations (section 5) are switches:
    * `length_normalize`: lp / n and rp / n instead of sums;
    * `entropy_bonus`: loss -= beta H, H the mean of the chosen and the rejected completion's entropy surrogates (over
      n with `length_normalize`; appendix B.2, which takes the mean over the 2B completions);
    * `auxiliary_weight=0`: without the term a log sigma(s_w - s_l);
    * `normalization=none`: q as it is.

    Raises ValueError for beta < 0, a < 0, another normalization, an empty micro-batch, or what does not go together.
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
    candidates: str = "pair"
    micro_batch_size: int = 2  # type: ignore[misc]  # of the class attribute an instance's

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.beta >= 0, f"beta must not be negative, got {self.beta}")
        require(self.auxiliary_weight >= 0, f"auxiliary_weight must not be negative, got {self.auxiliary_weight}")
        require(self.micro_batch_size >= 1, f"micro_batch_size must be at least 1, got {self.micro_batch_size}")
        require(
            self.normalization in ("micro_batch", "step", "group", "none"),
            f"normalization must be micro_batch, step, group or none, got {self.normalization!r}",
        )
        require(self.candidates in ("pair", "group"), f"candidates must be pair or group, got {self.candidates!r}")
        if self.candidates == "group":
            require(
                self.normalization in ("group", "none") and not self.auxiliary_weight and not self.entropy_bonus,
                "candidates=group goes with normalization=group or none, auxiliary_weight=0 and entropy_bonus=false",
            )
        else:
            require(self.normalization != "group", "normalization=group needs candidates=group")

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]
        return frozenset({"reference", "entropies"} if self.entropy_bonus else {"reference"})

    @property
    def completions(self) -> tuple[str, ...]:  # type: ignore[override]
        return GROUP if self.candidates == "group" else SIDES

    @property
    def scope(self) -> Scope:  # type: ignore[override]
        # Minimum and maximum are taken over these pairs.
        scopes: dict[str, Scope] = {"micro_batch": "micro_batch", "step": "step"}
        return scopes.get(self.normalization, "pair")

    def _rewards(self, inputs: PairInputs) -> tuple[Tensor, Tensor]:
        """q of both sides, `(B,)` each."""
        if self.candidates == "group":
            q, _ = self._group(inputs)
            return q[:, 0], q[:, 1]
        chosen_n, rejected_n = self._tokens(inputs)
        chosen = self.margin + self.beta * inputs.reference_chosen_logps / chosen_n
        rejected = self.beta * inputs.reference_rejected_logps / rejected_n
        q = torch.stack([chosen, rejected]).detach()
        if self.normalization != "none":
            # As published: 1e-6 in both places, so that q stays positive and equal rewards do not divide by zero.
            q = (q - q.min() + 1e-6) / (q.max() - q.min() + 1e-6)
        return q[0], q[1]

    def _group(self, inputs: PairInputs) -> tuple[Tensor, Tensor]:
        """(q, s) of all responses, `(B, n)`; s is -inf where there is none."""
        group = inputs.group
        tokens = group.lengths.clamp(min=1) if self.length_normalize else 1
        q = self.beta * group.reference_logps.detach() / tokens
        q = torch.cat([q[:, :1] + self.margin, q[:, 1:]], 1)
        if self.normalization == "group":
            low = q.masked_fill(~group.mask, torch.inf).amin(1, keepdim=True)
            high = q.masked_fill(~group.mask, -torch.inf).amax(1, keepdim=True)
            q = (q - low + 1e-6) / (high - low + 1e-6)
        return q, (group.policy_logps / tokens + q).masked_fill(~group.mask, -torch.inf)

    def _tokens(self, inputs: PairInputs) -> tuple[Tensor | int, Tensor | int]:
        return (inputs.chosen_lengths, inputs.rejected_lengths) if self.length_normalize else (1, 1)

    def scores(self, inputs: PairInputs) -> tuple[Tensor, Tensor]:
        chosen_n, rejected_n = self._tokens(inputs)
        chosen, rejected = self._rewards(inputs)
        return inputs.policy_chosen_logps / chosen_n + chosen, inputs.policy_rejected_logps / rejected_n + rejected

    def losses(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> Tensor:
        if self.candidates == "group":
            return -self._group(inputs)[1].logsumexp(1)
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
