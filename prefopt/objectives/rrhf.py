"""Rank responses to align with human feedback (Yuan et al. 2023, arXiv 2304.05302)."""

from dataclasses import dataclass, field

from torch import Tensor
from torch.nn.functional import relu

from prefopt.objectives import GROUP, SIDES
from prefopt.objectives.base import Need, PairInputs, Pairwise, require


@dataclass(frozen=True)
class RRHF(Pairwise):
    """loss = max(0, s_l - s_w) - nll_weight lp_w,  s = lp / n;  no reference, no margin, no beta.

    The ranking term is zero as soon as the chosen completion scores higher. The likelihood term is the paper's, the sum
    over the chosen completion (`nll_per=pair`). The authors' code (github.com/GanjinZero/RRHF) takes a mean over
    tokens, `nll_per=own_token` here; theirs divides by the length of the padded row with its prompt.

    The paper ranks n candidates of a prompt: `candidates=group` sums max(0, s_j - s_i) over all i and j with
    r_i > r_j (its Eq. 2), and the likelihood term is of the best candidate (Eq. 3). `candidates=pair` has two of them.
    Scores are s. Raises ValueError for other candidates.
    """

    equation = "max(0, lp_l/n_l − lp_w/n_w) − lp_w"
    paper = "2304.05302, Eq. 2 to 4"
    summary = "ranks by likelihood per token, and holds up the chosen one"

    nll_weight: float = field(default=1.0, kw_only=True)
    candidates: str = field(default="pair", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.candidates in ("pair", "group"), f"candidates must be pair or group, got {self.candidates!r}")

    @property
    def completions(self) -> tuple[str, ...]:  # type: ignore[override]
        return GROUP if self.candidates == "group" else SIDES

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]
        return frozenset({"rewards"} if self.candidates == "group" else ())

    def scores(self, inputs: PairInputs) -> tuple[Tensor, Tensor]:
        return (
            inputs.policy_chosen_logps / inputs.chosen_lengths,
            inputs.policy_rejected_logps / inputs.rejected_lengths,
        )

    def losses(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> Tensor:
        if self.candidates == "pair":
            return relu(rejected - chosen)
        group = inputs.group
        scores = group.policy_logps / group.lengths.clamp(min=1)
        both = group.mask[:, :, None] & group.mask[:, None, :]
        better = both & (group.rewards[:, :, None] > group.rewards[:, None, :])  # [b, i, j]: i is better than j
        return relu(scores[:, None, :] - scores[:, :, None]).masked_fill(~better, 0.0).sum((1, 2))

    def diagnostics(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
        return {"ranked_right": chosen > rejected}
