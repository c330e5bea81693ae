"""Rank responses to align with human feedback, on pairs (Yuan et al. 2023, arXiv 2304.05302)."""

from dataclasses import dataclass, field

from torch import Tensor
from torch.nn.functional import relu

from prefopt.objectives.base import PairInputs, Pairwise


@dataclass(frozen=True)
class RRHF(Pairwise):
    """loss = max(0, s_l - s_w) - nll_weight lp_w,  s = lp / n;  no reference, no margin, no beta.

    The ranking term is zero as soon as the chosen completion scores higher. The likelihood term is the paper's, the sum
    over the chosen completion (`nll_per=pair`). The authors' code (github.com/GanjinZero/RRHF) takes a mean over
    tokens, `nll_per=own_token` here; theirs divides by the length of the padded row with its prompt.

    The paper ranks n candidates of a prompt; a pair has two. With `dataset.format.pairing=all` every two responses of a
    prompt become a pair. The ranking terms are then the paper's, each pair by itself, but the likelihood term counts
    the better response of every pair, and not the best one alone. Scores are s.
    """

    equation = "max(0, lp_l/n_l − lp_w/n_w) − lp_w"
    paper = "2304.05302"
    summary = "ranks by likelihood per token, and holds up the chosen one"

    nll_weight: float = field(default=1.0, kw_only=True)

    def scores(self, inputs: PairInputs) -> tuple[Tensor, Tensor]:
        return (
            inputs.policy_chosen_logps / inputs.chosen_lengths,
            inputs.policy_rejected_logps / inputs.rejected_lengths,
        )

    def losses(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> Tensor:
        return relu(rejected - chosen)

    def diagnostics(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
        return {"ranked_right": chosen > rejected}
