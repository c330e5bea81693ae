"""DPO with a weight for each token (Liu et al. 2024, TIS-DPO, arXiv 2410.04350)."""

from dataclasses import dataclass

from torch import Tensor

from prefopt.objectives.base import PairInputs
from prefopt.objectives.dpo import DPO


@dataclass(frozen=True)
class TISDPO(DPO):
    """DPO of log-probs in which each token counts by its weight: lp = sum_t w_t lp_t, and the reference's alike.

    The weights come from the rows, and with all at 1 it is DPO. The paper estimates them from two contrastive models,
    so that a token counts more the more the good model prefers it, on the rejected side the less (`prefopt
    token_weights`). Weights below 0 are taken as they are; some of the authors' own are. Scores are beta * u of these
    log-probs. Label smoothing is DPO's, and the likelihood term of `nll_weight` has no token weights.

    The loss is that of the authors' code (github.com/exlaw/TIS-DPO) at its default. Their `token_level`, off there,
    also subtracts alpha (D_w - D_l), D = sum_t w_t KL(pi || pi_ref); that is not here. Their code always gives the
    terminator the weight 0; here it has the weight that the row says. The paper itself was not at hand. Raises
    ValueError where DPO does.
    """

    equation = "DPO’s with lp = Σ_t w_t lp_t, rp alike, w_t of the rows"
    paper = "2410.04350"
    summary = "DPO with a weight for each token, such as two contrastive models give it"
    needs = frozenset({"reference", "token_weights"})

    def scores(self, inputs: PairInputs) -> tuple[Tensor, Tensor]:
        chosen = inputs.policy_chosen_weighted_logps - inputs.reference_chosen_weighted_logps
        rejected = inputs.policy_rejected_weighted_logps - inputs.reference_rejected_weighted_logps
        return self.beta * chosen, self.beta * rejected
