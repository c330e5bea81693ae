"""Sequence likelihood calibration from human feedback (Zhao et al. 2023, SLiC-HF, arXiv 2305.10425)."""

from dataclasses import dataclass, field

from torch import Tensor
from torch.nn.functional import relu

from prefopt.objectives.base import PairInputs, Pairwise, require


@dataclass(frozen=True)
class SLiC(Pairwise):
    """loss = max(0, margin - lp_w + lp_l) - nll_weight lp_w;  no reference.

    The hinge on sums of log-probabilities, as HALOs has it (github.com/ContextualAI/HALOs, SLiCTrainer), with its
    defaults; `margin` is the paper's delta. With a reference the same hinge is `objective=gpo
    objective.function=hinge`. The likelihood term is part of this objective, and `nll_weight` is its lambda; the paper
    takes it over the targets of fine-tuning, here it is over the chosen completions. Scores are lp. Raises ValueError
    for margin <= 0.
    """

    equation = "max(0, δ − lp_w + lp_l) − λ lp_w, λ = nll_weight"
    paper = "2305.10425"
    summary = "a hinge: pairs that are a margin apart no longer push, and the chosen likelihood is held up"

    margin: float = 1.0
    nll_weight: float = field(default=0.1, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.margin > 0, f"margin must be positive, got {self.margin}")

    def scores(self, inputs: PairInputs) -> tuple[Tensor, Tensor]:
        return inputs.policy_chosen_logps, inputs.policy_rejected_logps

    def losses(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> Tensor:
        return relu(self.margin - chosen + rejected)

    def diagnostics(self, inputs: PairInputs, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
        return {"past_margin": chosen - rejected > self.margin}
