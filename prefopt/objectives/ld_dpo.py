"""DPO that counts length less (Liu et al. 2024, LD-DPO, arXiv 2409.06411)."""

from dataclasses import dataclass

from torch import Tensor

from prefopt.objectives.base import PairInputs, require
from prefopt.objectives.dpo import DPO


@dataclass(frozen=True)
class LDDPO(DPO):
    """DPO of log-probs in which the tokens behind the length of the pair's shorter completion count `alpha` times.

    lp = sum_{t <= m} lp_t + alpha sum_{t > m} lp_t with m = min(n_w, n_l), and the reference's alike. Alpha 1 is DPO,
    and at alpha 0 the end of the longer completion does not count. The formula and the range of alpha were read in TRL
    (`ld_alpha`), not in the paper. Scores are beta * u of these log-probs. Raises ValueError where DPO does, and for
    alpha outside [0, 1].
    """

    equation = "DPO’s with lp = Σ_{t≤m} lp_t + α Σ_{t>m} lp_t, rp alike, m = min(n_w, n_l)"
    paper = "2409.06411"
    summary = "DPO that counts the tokens behind the pair's shorter length less, against long answers"
    needs = frozenset({"reference", "prefixes"})

    alpha: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.alpha <= 1, f"alpha must be in [0, 1], got {self.alpha}")

    def scores(self, inputs: PairInputs) -> tuple[Tensor, Tensor]:
        chosen = inputs.policy_chosen_prefix_logps - inputs.reference_chosen_prefix_logps
        rejected = inputs.policy_rejected_prefix_logps - inputs.reference_rejected_prefix_logps
        return self._reward(inputs.chosen_logratios, chosen), self._reward(inputs.rejected_logratios, rejected)

    def _reward(self, whole: Tensor, prefix: Tensor) -> Tensor:
        """beta u, from the log-ratios of whole completions and of their prefixes."""
        return self.beta * (prefix + self.alpha * (whole - prefix))
