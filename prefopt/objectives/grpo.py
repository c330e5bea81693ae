"""Group relative policy optimization (Shao et al. 2024, arXiv 2402.03300)."""

from dataclasses import dataclass

from torch import Tensor

from prefopt.objectives.base import Need, clamped_exp, require
from prefopt.objectives.groupwise import GroupInputs, Groupwise
from prefopt.objectives.rloo import clipped, is_clipped


@dataclass(frozen=True)
class GRPO(Groupwise):
    """loss = mean over responses, and over the tokens of each, of -min(rho A, clip(rho, 1 +- epsilon) A) + beta k3.

    Of each token rho = exp(lp_t - op_t), op by the policy that has drawn the responses, and k3 = e^d - d - 1 with
    d = rp_t - lp_t, an unbiased estimate of KL(pi || pi_ref). All tokens of a response have its advantage
    A = (r - mean) / (std + 1e-4), over the n responses to the prompt, std with n - 1 in the denominator (TRL 1.16).

    * `scale=none`: A = r - mean, without the preference for prompts whose rewards are close (Dr. GRPO, arXiv
      2503.20783).
    * `per=token`: the mean over all tokens of the step, so that every token counts the same (DAPO, arXiv 2503.14476).

    TRL 1.16 also multiplies k3 by rho unless use_bias_correction_kl=False; the paper does not, and nor is it done here.
    Exponents beyond 40 nats follow the tangent. Raises ValueError for beta < 0, epsilon outside (0, 1), or another
    scale or per.
    """

    equation = (
        "mean over n and tokens of −min(ρA, clip(ρ, 1±ε)A) + β(e^d − d − 1), ρ = exp(lp_t − op_t), d = rp_t − lp_t, "
        "A = (r − mean)/std"
    )
    paper = "2402.03300, Eq. 3"
    summary = "policy gradient per token on rewards standardized in their group; op: lp of the policy that drew them"
    made_for = frozenset({"online"})

    beta: float = 0.04
    epsilon: float = 0.2
    scale: str = "group"
    per: str = "response"

    def __post_init__(self) -> None:
        require(self.beta >= 0, f"beta must not be negative, got {self.beta}")
        require(0 < self.epsilon < 1, f"epsilon must lie between 0 and 1, got {self.epsilon}")
        require(self.scale in ("group", "none"), f"scale must be group or none, got {self.scale!r}")
        require(self.per in ("response", "token"), f"per must be response or token, got {self.per!r}")

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]
        needs: set[Need] = {"rewards", "initial", "tokens"}
        return frozenset(needs | {"reference"} if self.beta else needs)

    @property
    def step0_loss(self) -> float | None:  # type: ignore[override]
        # The advantages of a group add up to zero; those of its tokens do not.
        return 0.0 if self.per == "response" else None

    def advantages(self, group: GroupInputs) -> Tensor:
        """(B, n), 0 where there is no response."""
        centered = (group.rewards - group.mean(group.rewards)[:, None]).masked_fill(~group.mask, 0.0)
        if self.scale == "none":
            return centered
        deviations = (centered.square().sum(1) / (group.sizes - 1)).sqrt()
        return centered / (deviations[:, None] + 1e-4)

    def losses(self, group: GroupInputs) -> Tensor:
        ratios = clamped_exp(group.policy_tokens - group.initial_tokens)
        losses = clipped(ratios, self.advantages(group)[..., None], self.epsilon)
        if self.beta:
            losses = losses + self.beta * self._k3(group)
        sums = losses.masked_fill(~group.token_mask, 0.0).sum(-1)
        if self.per == "token":  # the mean over groups of this is the sum of all tokens' losses over their number
            return sums.sum(1) / group.mean_tokens
        return group.mean(sums / group.lengths.clamp(min=1))

    def _k3(self, group: GroupInputs) -> Tensor:
        """(B, n, T)."""
        d = group.reference_tokens - group.policy_tokens
        return clamped_exp(d) - d - 1

    def diagnostics(self, group: GroupInputs) -> dict[str, Tensor]:
        ratios = (group.policy_tokens - group.initial_tokens).exp()
        outside = is_clipped(ratios, self.advantages(group)[..., None], self.epsilon).to(ratios.dtype)
        values = {"clipped": outside} | ({"k3": self._k3(group)} if self.beta else {})
        tokens = group.lengths.sum(1)
        means = {name: (value * group.token_mask).sum((1, 2)) / tokens for name, value in values.items()}
        return means | {"reward": group.mean(group.rewards)}
